"""What can't be observed of a model: how its tokens are laid out and what its first block sees."""

from fastdit.models.family import Family, families, family_of, register_family

__all__ = ["Family", "families", "family_of", "register_family"]
