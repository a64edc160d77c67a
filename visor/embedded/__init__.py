"""The small models that ship: their architecture, vocabulary, curriculum, stages and recipes.

The command is `python -m visor.embedded.train`. Nobody in `visor` imports this room; it imports `visor.training` and
what lies below. It hands training what training cannot know: what a scene says in the tokens of these models.
"""

from typing import Any

__all__ = ["SceneTokens"]


def __getattr__(name: str) -> Any:
    if name == "SceneTokens":  # which brings torch
        from visor.embedded.scene_tokens import SceneTokens

        return SceneTokens
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
