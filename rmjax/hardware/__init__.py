"""What hardware can do and what a program asks of it.

`flops` counts, `memory` asks the compiler, `topology` describes TPUs and GPUs that are not here, and `collectives`
reads from a compiled program what the devices send each other.
"""
