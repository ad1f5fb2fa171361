"""Prepares a tensorflow-datasets set so that fedjax_sim reads it without TensorFlow.

    .venv/bin/pip install -e '.[prepare]'
    .venv/bin/python scripts/prepare_tfds.py cifar10 --data-dir ~/fedjax_sim_data

Downloads, and writes array_record files. TensorFlow is needed here and nowhere else: the folder can
be carried to machines that have none. `NAME/CONFIG` picks one configuration (`emnist/byclass`).
"""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with a message on what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="the set, as tensorflow-datasets calls it")
    parser.add_argument(
        "--data-dir", default="~/fedjax_sim_data", help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--download-dir", help="where archives are kept; offline, put them into its folder `manual`"
    )
    args = parser.parse_args(argv)
    try:
        import tensorflow  # noqa: F401  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
        import tensorflow_datasets as tfds
    except ImportError as e:
        fix = "In the clone of the repository: .venv/bin/pip install -e '.[prepare]'"
        print(f"{e.name} is missing. {fix}", file=sys.stderr)
        return 2
    from pathlib import Path

    where = str(Path(args.data_dir).expanduser())
    try:
        builder = tfds.builder(args.name, data_dir=where, file_format="array_record")
    except (tfds.core.DatasetNotFoundError, ValueError) as e:
        print(f"name = {args.name!r}: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2
    builder.download_and_prepare(download_dir=args.download_dir)
    sizes = ", ".join(f"{name} {split.num_examples:,}" for name, split in builder.info.splits.items())
    print(f"{builder.info.full_name}: {sizes}, in {builder.data_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
