"""XLA without its optimizations: programs compile in half the time and run slower, where no speed is tested."""

OPTIONS = {"xla_backend_optimization_level": 0}  # compiler_options of jax.jit
FLAGS = "--xla_backend_optimization_level=0"  # XLA_FLAGS of a process
