"""Malformed inputs of every kind, as command lines."""

from malformed.commands import arguments, folders
from malformed.models_and_text import specs, teachers, texts
from malformed.recipes import recipes
from malformed.train import train
from malformed.world import Case, World, make_world

KINDS = (teachers, texts, recipes, train, specs, folders, arguments)

__all__ = ["KINDS", "Case", "World", "make_world"]
