"""Auxiliary losses for scenes with ground truth: facts, words and attention, each a file, none a part of the model.

Imported by `visor.training` and `visor.embedded` only. `scene_targets` is the contract: what a scene says in token ids
comes from an object that the caller hands in. All are off unless a recipe gives them a weight.
"""
