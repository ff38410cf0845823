"""What is learnt: one file and one row here for each objective."""

from ml_collections import ConfigDict

from rmjax.objectives.bradley_terry import BradleyTerry

OBJECTIVES = {"bradley_terry": BradleyTerry}


def make(config: ConfigDict) -> BradleyTerry:
    """Builds the objective that `config.objective` names; its other keys are the objective's fields.

    Raises:
        ValueError: an objective that is not in the table.
    """
    values = config.to_dict()
    name = values.pop("name")
    if name not in OBJECTIVES:
        raise ValueError(f"config.objective.name={name!r} is unknown; there is {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[name](**values)
