"""What was probably meant by a name that does not exist."""

from rmjax.suggestions import closest, did_you_mean


def test_a_name_is_suggested_if_it_is_like_one_that_exists():
    known = {"learning_rate": 1, "warmup": 2}
    assert closest("lerning_rate", known) == "learning_rate" and closest("x", known) == ""
    assert did_you_mean("lerning_rate", known) == "; did you mean 'learning_rate'?"
    assert did_you_mean("warmip", known, "--config.{}") == "; did you mean --config.warmup?"
    assert did_you_mean("x", known) == ""
