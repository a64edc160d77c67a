"""The small models that ship: their architecture, vocabulary, curriculum, stages and recipes.

The command is `python -m visor.embedded.train`. Nobody in `visor` imports this room; it imports `visor.training` and
what lies below. It hands training what training cannot know: what a scene says in the tokens of these models.
"""

from visor._lazy import handed_on

__all__ = ["SceneTokens"]
__getattr__ = handed_on(__name__, {"SceneTokens": "scene_tokens"})
