"""The atlas: the data of `mule demo`, made from facts written by hand."""

from mule.data.atlas.facts import COUNTRIES, Country
from mule.data.atlas.generate import AtlasFiles, generate
from mule.data.atlas.plan import Sizes

__all__ = ["COUNTRIES", "AtlasFiles", "Country", "Sizes", "generate"]
