"""What can't be observed of a model: how its tokens are laid out and what its first block sees."""

from fastdit.models.family import Family, family_of

__all__ = ["Family", "family_of"]
