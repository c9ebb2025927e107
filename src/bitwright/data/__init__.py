"""Data: splits that give batches, and the named data sets."""

from bitwright.data.corruptions import CORRUPTIONS, corrupt
from bitwright.data.folders import FolderSplit
from bitwright.data.quality import Condition, Mix, MixedSplit, Quality, mixed, parse_conditions
from bitwright.data.sources import Data, available_data, check_model, load_data
from bitwright.data.splits import DatasetSplit, Split, TensorSplit, check_labels

__all__ = [
    "CORRUPTIONS",
    "Condition",
    "Data",
    "DatasetSplit",
    "FolderSplit",
    "Mix",
    "MixedSplit",
    "Quality",
    "Split",
    "TensorSplit",
    "available_data",
    "check_labels",
    "check_model",
    "corrupt",
    "load_data",
    "mixed",
    "parse_conditions",
]
