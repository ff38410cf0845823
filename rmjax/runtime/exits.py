"""What the commands end with, for scripts that start them (launch/)."""

DONE = 0
FAILED = 1  # the run failed; starting it again will most likely fail again
BAD_INPUT = 2  # arguments, config, data, model or checkpoints that cannot be used
NOT_GOOD_ENOUGH = 3  # all went well, but the model fails the quality gate, and config.gate.exit_code asks to say so
AGAIN = 75  # stopped early with nothing lost, or another process was lost: start it again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # Ctrl-C


class InputError(ValueError):
    """Bad input that can only be found once the run is under way."""
