"""Tests, in the folders of what they test; helpers/ has what several of them share."""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the checkout
