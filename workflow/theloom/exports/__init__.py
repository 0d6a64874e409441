"""A file of hidden states in the formats of other projects: `theloom export`, and `export`."""

from theloom.exports.formats import FORMATS
from theloom.exports.run import Exported, export

__all__ = ["FORMATS", "Exported", "export"]
