"""Sets, where they come from, and who holds what of them."""

from fedjax_sim.data import presets
from fedjax_sim.data.dataset import Dataset, as_dataset, union
from fedjax_sim.data.partition_config import KINDS, PartitionConfig
from fedjax_sim.data.partition_files import Partition, as_partition, load_partition, save
from fedjax_sim.data.partition_reports import effective_classes, label_counts, plot, summary
from fedjax_sim.data.partitions import partition
from fedjax_sim.data.presets import PRESETS
from fedjax_sim.data.samples import Samples
from fedjax_sim.data.sources import SCHEMES, default_data_dir, names
from fedjax_sim.data.sources import load_dataset as load
from fedjax_sim.data.tables import TableDataset
from fedjax_sim.tasks.preprocessing import Preprocessing, augment, normalise

__all__ = [
    "KINDS",
    "PRESETS",
    "SCHEMES",
    "Dataset",
    "Partition",
    "PartitionConfig",
    "Preprocessing",
    "Samples",
    "TableDataset",
    "as_dataset",
    "as_partition",
    "augment",
    "default_data_dir",
    "effective_classes",
    "label_counts",
    "load",
    "load_partition",
    "names",
    "normalise",
    "partition",
    "plot",
    "presets",
    "save",
    "summary",
    "union",
]
