"""What TensorBoard is given beside scalars, read back from the event files."""

import dataclasses
import io
import struct

import numpy as np
from PIL import Image
from tensorboardX.proto.api_pb2 import Status
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

import fedjax_sim as fs
from fedjax_sim.records.tensorboard import Events


def summaries(folder):
    """(step, value) of every summary in a folder's event files, in order."""
    found = []
    for path in sorted(folder.glob("*tfevents*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            event = Event()
            event.ParseFromString(content[at + 12 : at + 12 + length])
            at += length + 16
            found += [(event.step, value) for value in event.summary.value]
    return found


def test_events_hold_settings_figures_and_histograms(tmp_path):
    output = fs.OutputConfig(dir=str(tmp_path / "run"), progress=False, histograms=True)
    config = fs.RunConfig(
        rounds=3,
        partition=fs.PartitionConfig(kind="iid", clients=4),
        model=fs.ModelConfig("mlp", options={"hidden": [4]}),
        local=fs.LocalConfig(epochs=None, steps=2, lr=0.5),
        cohort=fs.CohortConfig(size=2),
        evaluation=fs.EvaluationConfig(every=2),
        execution=fs.ExecutionConfig(devices=1, rounds_per_call=2),
        output=output,
    )
    run = fs.run(config)
    found = summaries(run.folder / "tensorboard")
    weights = {(value.tag, step): value.histo for step, value in found if value.HasField("histo")}
    assert {step for _, step in weights} == {2, 3}
    kernel = run.variables["params"]["fc1"]["kernel"]
    last = weights["weights/params/fc1/kernel", 3]
    assert last.num == kernel.size == sum(last.bucket)
    np.testing.assert_allclose((last.min, last.max), (kernel.min(), kernel.max()))
    np.testing.assert_allclose(last.sum, kernel.astype(np.float64).sum())
    earlier = fs.run(dataclasses.replace(config, rounds=2, output=fs.OutputConfig(progress=False)))
    kernel = earlier.variables["params"]["fc1"]["kernel"].astype(np.float64)
    np.testing.assert_allclose(weights["weights/params/fc1/kernel", 2].sum_squares, (kernel**2).sum())
    images = {value.tag: value.image for _, value in found if value.HasField("image")}
    for name in ("curves", "partition"):
        png = (run.folder / "figures" / f"{name}.png").read_bytes()
        with Image.open(io.BytesIO(png)) as drawn:
            image = images[f"figures/{name}"]
            assert image.encoded_image_string == png and (image.width, image.height) == drawn.size
    hyper = {}
    for _, value in found:
        if value.metadata.plugin_data.plugin_name == "hparams":
            hyper[value.tag] = HParamsPluginData.FromString(value.metadata.plugin_data.content)
    settings = hyper["_hparams_/session_start_info"].session_start_info.hparams
    assert settings["local.lr"].number_value == 0.5 and settings["algorithm.name"].string_value == "fedavg"
    assert settings["evaluation.per_client"].WhichOneof("kind") == "bool_value"
    assert not [name for name in settings if name.startswith(("output.", "execution.", "given"))]
    assert hyper["_hparams_/session_end_info"].session_end_info.status == Status.Value("STATUS_SUCCESS")


def test_a_weight_that_is_not_finite_spoils_no_histogram(tmp_path):
    events = Events(tmp_path)
    events.histograms({"a": np.array([np.nan, 1.0, np.inf, 2.0]), "b": np.array([np.nan])}, 1)
    events.close()
    ((_, value),) = summaries(tmp_path)
    assert value.tag == "weights/a" and value.histo.num == 2
