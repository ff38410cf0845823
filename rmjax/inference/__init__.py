"""Trained models that answer: `RewardModel` (also `rmjax.RewardModel`) scores conversations.

`reward_model` opens an export, `ensembles` several as one, `runs` any checkpoint of a run, `engine` computes in padded
batches, and `contract` reads and writes reward_contract.json, which says what the outputs mean.
"""
