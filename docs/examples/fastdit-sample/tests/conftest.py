"""Engines of the tests are kept in a folder of the session, so that each is built once."""

from fastdit.testing import private_folders as private_folders
