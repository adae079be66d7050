"""Exports a trained network to ONNX and to a torch.export program, and runs both beside PyTorch.

    python export.py --checkpoint runs/train/best.pt    # runs/export/network.onnx, network.pt2, export.json
    python export.py --forms int8 half                  # also network.int8.onnx and network.half.onnx
    python export.py --sizes                            # time and memory of pictures from 64 px to 1080p

The files take `noisy`, of any batch, height and width; they pad, normalise and crop themselves. The outputs
are `image` and `logits`, as far as the network makes them. Fails where an output differs by more than 1e-4
from PyTorch's; of int8 and half it measures PSNR and accuracy. ONNX needs the packages in
requirements-optional.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import io
import json
import logging
import math
import multiprocessing
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config

import data
import denoise
import eval as evaluation
import files
import latency
import models
import run
import timing
from data import Parser, whole

FORMAT, VERSION = "joint-onnx", 2
ABOUT = {"model": str, "channels": range(1, 5), "scale": range(1, 17), "multiple": (range(1, 1025), None),
         "parameters": int, "macs": int,
         **{name: files.CHECKPOINT[name] for name in ("classes", "size", "data", "seed", "splits", "epoch")}}
LARGEST_DIFFERENCE = 1e-4  # of an output of an exported network, on images in [0, 1]
SHAPES = ((1, 64, 64), (3, 65, 97), (1, 33, 128), (2, 40, 40))  # of the check: batch, height, width
SIZES = ("64", "128", "256", "512", "1280x720", "1920x1080")  # of --sizes
FORMS = ("int8", "half")  # smaller ONNX files
QUANTISED = ("Conv", "ConvTranspose", "Relu", "MaxPool")  # the ONNX operations that int8 changes
CALIBRATION_IMAGES, TEST_IMAGES, MOST_PIXELS = 44, 64, 128  # of int8, of the quality, and their largest side
OPTIONAL = "pip install -r requirements-optional.txt"


def optional(name: str):
    """The optional package of this name; ValueError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"The package {name} is not installed; install it with: {OPTIONAL}") from None


class Deployed(nn.Module):
    """A network with folded batch norms whose outputs are a tuple, without those that it does not make."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = latency.fold_batch_norm(network)

    def forward(self, noisy: Tensor, boxes: Tensor | None = None) -> tuple[Tensor, ...]:
        return made(models.apply_network(self.network, noisy, boxes))


def output_names(network: nn.Module) -> list[str]:
    """The names of an exported network's outputs."""
    return ["image"] * network.denoises + ["logits"] * network.classifies


def made(outputs) -> tuple[Tensor, ...]:
    """The outputs that a network makes."""
    return tuple(output for output in outputs if output is not None)


def example_inputs(network: nn.Module, batch: int, height: int, width: int, seed: int = 0) -> tuple:
    """Random images (B, C, H, W) with noise, and two boxes (B, 2, 4) where the network takes boxes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, models.channels_of(network), height, width)
    image = torch.rand(shape, generator=generator) + 0.2 * torch.randn(shape, generator=generator)
    box = torch.tensor([[0.0, 0.0, 28.0, 28.0], [4.0, 3.0, 32.0, 31.0]]).expand(batch, -1, -1)
    return (image, box.contiguous()) if getattr(network, "takes_boxes", False) else (image,)


def export_program(network: nn.Module) -> torch.export.ExportedProgram:
    """The torch.export program of a network on the CPU, for any batch, height and width."""
    deferred = "prefer_deferred_runtime_asserts_over_guards"
    known = inspect.signature(torch.export.export).parameters
    if deferred not in known or not hasattr(fx_config, "backed_size_oblivious"):
        raise ValueError(f"export.py needs torch 2.9 or later, and this is {torch.__version__}.")
    deployed, example = Deployed(network).eval(), example_inputs(network, 2, 70, 90)
    free = torch.export.Dim.DYNAMIC
    shapes = ({0: free, 2: free, 3: free}, {0: free, 1: free})[:len(example)]
    # Without it torch would refuse sizes that are a multiple of the stride, which the example's is not.
    with torch.no_grad(), fx_config.patch(backed_size_oblivious=True):
        return torch.export.export(deployed, example, dynamic_shapes=shapes, **{deferred: True})


def write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program for torch.export.load."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, content)
    files.write_file(path, lambda temporary: temporary.write_bytes(content.getvalue()))


def write_onnx(program: torch.export.ExportedProgram, path: Path, names: list[str], about: dict) -> None:
    """Write a program as an ONNX file of one piece; `about` goes into its metadata, as JSON."""
    optional("onnxscript")
    onnx = optional("onnx")
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they speak of what they rewrite
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False,
                                     output_names=names)
    model = exported.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # the lines of source of each, with the paths of this machine
    onnx.helper.set_model_props(model, {"joint": json.dumps(about)})
    files.write_file(path, lambda temporary: temporary.write_bytes(model.SerializeToString()))


def run_session(session, names: list[str], inputs: list[Tensor]) -> list[Tensor]:
    """These outputs of a session of onnxruntime; RuntimeError with its reason where it fails."""
    options = optional("onnxruntime").RunOptions()
    options.log_severity_level = 4  # the error says it
    given = {each.name: value.numpy(force=True)
             for each, value in zip(session.get_inputs(), inputs, strict=True)}
    try:
        return [torch.from_numpy(output) for output in session.run(names, given, options)]
    except Exception as error:  # onnxruntime's exceptions have no class of Python's above them
        reason, (height, width) = str(error).split("Status Message: ")[-1], inputs[0].shape[-2:]
        raise RuntimeError(f"onnxruntime fails at {width}x{height} pixels: {reason}") from None


class OnnxNetwork(nn.Module):
    """A network in a file of `write_onnx`, run by onnxruntime on the CPU; called as the network itself.

    ValueError in one sentence where the file is damaged or not one of this project.
    """

    def __init__(self, path: str | Path, threads: int = 1):
        super().__init__()
        optional("onnxruntime")
        try:
            self.content, self.threads = Path(path).read_bytes(), threads
            self.session = timing.start_session(self.content, threads)
            self.about = dict(json.loads(self.session.get_modelmeta().custom_metadata_map["joint"]))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); make it with export.py.") from None
        except Exception as error:  # onnxruntime has an exception of its own for each kind of damage
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise ValueError(f"{path} is not an ONNX file of export.py ({reason}).") from None
        if self.about.get("format") != FORMAT or self.about.get("version") != VERSION:
            raise ValueError(f"{path} is not {FORMAT} version {VERSION}; make it again with export.py.")
        files.check_fields(path, self.about, ABOUT)
        self.names = [output.name for output in self.session.get_outputs()]
        self.denoises, self.classifies = "image" in self.names, "logits" in self.names
        self.channels, self.scale = self.about["channels"], self.about["scale"]
        self.multiple, self.takes_boxes = self.about["multiple"], len(self.session.get_inputs()) > 1
        self.cost = {"parameters": self.about["parameters"], "macs": self.about["macs"],
                     "size_px": self.about["size"] // self.scale}

    def forward(self, noisy: Tensor, boxes: Tensor | None = None) -> models.Output:
        outputs = run_session(self.session, self.names, [noisy] if boxes is None else [noisy, boxes])
        found = dict(zip(self.names, outputs))
        return models.Output(found.get("image"), found.get("logits"))

    def measure(self, setting: latency.Setting) -> latency.Timing:
        """Milliseconds per batch, in a setting of the mode onnx."""
        inputs = example_inputs(self, setting.batch, setting.size, setting.size)
        return latency.measure(lambda: self(*inputs), "cpu", warmup=10, repeats=50, seconds=1.0)

    def in_parts(self) -> OnnxParts:
        """The same network, for denoise.denoise_tiled."""
        return OnnxParts(self)


class GlobalPool(nn.Module):
    """The place of an average pool over the whole map in an ONNX file: the names of its input and output."""

    def __init__(self, node):
        super().__init__()
        self.source, self.result, self.avgpool = node.input[0], node.output[0], nn.AdaptiveAvgPool2d(1)


class OnnxParts(nn.Module):
    """The image of an OnnxNetwork, computed up to each average pool over the whole map and from there on.
    denoise.denoise_tiled replaces these pools, as in any network: a tile must not have a mean of its own."""

    def __init__(self, network: OnnxNetwork):
        super().__init__()
        onnx = optional("onnx")
        self.model, self.threads = onnx.load_model_from_string(network.content), network.threads
        self.scale, self.multiple = network.scale, network.multiple
        self.session = self.place = None  # of the part that was computed last, the name of its output
        axes = {tensor.name for tensor in self.model.graph.initializer if tensor.dims == [2] and
                sorted(onnx.numpy_helper.to_array(tensor) % 4) == [2, 3]}
        self.pools = nn.ModuleList(GlobalPool(node) for node in self.nodes_of("image", set()) if
                                   node.op_type == "ReduceMean" and node.input[1] in axes)

    def nodes_of(self, output: str, given: set[str]) -> list:
        """The nodes that compute a value from given ones, in their order."""
        wanted, nodes = {output} - given, []
        for node in reversed(self.model.graph.node):
            if wanted & set(node.output):
                wanted |= set(node.input) - given
                nodes.insert(0, node)
        return nodes

    def compute(self, output: str, given: dict[str, Tensor]) -> Tensor:
        """A value of the graph from others, by a session for this part alone: one at a time is in memory."""
        if self.place != output:
            onnx, graph = optional("onnx"), self.model.graph
            nodes = self.nodes_of(output, set(given))
            used = {name for node in nodes for name in node.input}
            weights = [tensor for tensor in graph.initializer if tensor.name in used]
            value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            part = onnx.helper.make_graph(nodes, "part", [value(name) for name in given if name in used],
                                          [value(output)], weights)
            part = onnx.helper.make_model(part, opset_imports=self.model.opset_import,
                                          ir_version=self.model.ir_version)
            self.session, self.place = None, output  # the memory of the last part is free again
            self.session = timing.start_session(part.SerializeToString(), self.threads)
        inputs = [given[each.name] for each in self.session.get_inputs()]
        return run_session(self.session, [output], inputs)[0]

    def forward(self, noisy: Tensor) -> models.Output:
        given = {"noisy": noisy}
        for pool in self.pools:
            mean = getattr(pool.avgpool, "mean", None)  # known, of the whole picture
            given[pool.result] = (mean.float() if mean is not None else
                                  pool.avgpool(self.compute(pool.source, given)))
        return models.Output(self.compute("image", given), None)


def load_onnx(path: str | Path, threads: int = 1) -> tuple[OnnxNetwork, dict]:
    """The network of an ONNX file, and what eval.py needs of a checkpoint's content, from its metadata."""
    network = OnnxNetwork(path, threads)
    setting = {"device_type": "cpu", "batch": 1, "threads": threads, "dtype": "float32", "mode": "onnx"}
    record = {"model": network.about["model"], "latency": {"setting": setting}}
    flags = {name: network.about.get(name) for name in evaluation.OF_TRAINING}
    return network, {**network.about, "flags": flags, "record": record}


@torch.no_grad()
def node_paths(network: nn.Module, example: Tensor) -> dict[nn.Module, str]:
    """How the names of the ONNX nodes of each module begin that the network calls: by the modules around it,
    each without the name of the one before; of the items of a list with it."""
    names, around, paths = {module: name for name, module in network.named_modules()}, [("", "")], {}

    def enter(module, _):
        outer, label = around[-1]
        own = names[module].removeprefix(f"{outer}.")
        around.append((names[module], f"{label}.{own}" if own[:1].isdigit() else own))
        paths[module] = "".join(f"/{label}" for _, label in around[2:]) + "/"

    def leave(*_):
        around.pop()

    handles = [handle for module in network.modules() for handle in (
        module.register_forward_pre_hook(enter), module.register_forward_hook(leave))]
    network(example)
    for handle in handles:
        handle.remove()
    return paths


class Traced(nn.Module):
    """A network that onnxruntime runs on images like `example` only, for timing: made in a second, where
    `export_program` takes ten. `network`: it with folded batch norms; `content`: of its ONNX file;
    `paths` and `fused`: see timing.part_times."""

    def __init__(self, network: nn.Module, example: Tensor, threads: int):
        super().__init__()
        deployed, content = Deployed(network).eval(), io.BytesIO()
        onnx = optional("onnx")
        self.network, self.threads, self.paths = deployed.network, threads, node_paths(deployed, example)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                torch.onnx.export(deployed, (example,), content, dynamo=False, verbose=False,
                                  input_names=["noisy"])
            except torch.onnx.errors.OnnxExporterError as error:  # it has no antialiased bicubic enlargement
                raise ValueError(f"The mode onnx cannot time this network ({error}).") from None
        self.content = content.getvalue()
        nodes = onnx.load_model_from_string(self.content).graph.node
        convolutions = {node.output[0]: node.name for node in nodes if node.op_type == "Conv"}
        self.fused = {node.name: convolutions[node.input[0]]  # activation -> convolution that takes it in
                      for node in nodes if node.input and node.input[0] in convolutions
                      and node.op_type not in ("Conv", "Add")}

    @functools.cached_property
    def session(self):
        return timing.start_session(self.content, self.threads)

    def restart(self) -> None:
        """Let the next call begin a new session."""
        self.__dict__.pop("session", None)

    def forward(self, noisy: Tensor) -> list:
        return self.session.run(None, {"noisy": noisy.numpy()})

    def time_parts(self, parts: list[nn.Module], images: Tensor, runs: int) -> list[float]:
        """The median milliseconds of each part in `runs` passes, by onnxruntime's profile of its nodes."""
        paths = [self.paths[part] for part in parts]
        return timing.part_times(self.content, self.threads, images.numpy(), paths, self.fused, runs)


class SharedWeights:
    """Files of random numbers in a folder from which many networks read their large weights, for timing. No
    two weights of a network are one number of a file, and their standard deviation is what it was, to a
    factor of 1.4 (0 remains 0). So the folder takes little more than the largest network."""

    FILE = "weights-{:g}.bin"
    SMALLEST = 1024  # numbers; smaller tensors stay in the network's own file. Places are multiples of it

    def __init__(self, folder: Path):
        optional("onnx")
        self.folder, self.sizes = folder, Counter()  # standard deviation -> how many numbers

    def write(self, content: bytes, name: str) -> None:
        """Write the ONNX file `name`, from the content of one with weights of its own."""
        import onnx
        model, places = onnx.load_model_from_string(content), Counter()
        for tensor in model.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor)
            large = values.dtype == np.float32 and values.size >= self.SMALLEST
            if large and (values.std() > 0 or not values.any()):
                spread = 2.0 ** round(math.log2(values.std())) if values.any() else 0.0
                onnx.external_data_helper.set_external_data(
                    tensor, self.FILE.format(spread), 4 * places[spread], 4 * values.size)
                tensor.ClearField("raw_data")
                places[spread] += -(-values.size // self.SMALLEST) * self.SMALLEST
        self.sizes |= places  # the larger of both
        files.write_file(self.folder / name,
                         lambda temporary: temporary.write_bytes(model.SerializeToString()))

    def finish(self) -> None:
        """Write the numbers."""
        rng = np.random.default_rng(0)
        for spread, count in sorted(self.sizes.items()):
            values = rng.standard_normal(count, np.float32) * np.float32(spread)
            files.write_file(self.folder / self.FILE.format(spread),
                             lambda temporary: temporary.write_bytes(values.tobytes()))


def largest_difference(network: nn.Module, form, inputs: list[tuple[Tensor, ...]]) -> float | None:
    """The largest difference of an output between a network and another form of it, over all inputs; None
    where it is not finite."""
    differences = []
    with torch.inference_mode():
        for each in inputs:
            pairs = zip(made(models.apply_network(network, *each)), made(form(*each)), strict=True)
            differences += [(ours - theirs).abs().max() for ours, theirs in pairs]
    largest = float(torch.stack(differences).max())
    return largest if math.isfinite(largest) else None


def pictures(name: str, network: nn.Module, seed: int = 0, most: int = 512) -> list[tuple[Tensor, ...]]:
    """Four pictures with noise, each a batch of its own size, at most 512 px: of a folder, or drawn ones."""
    channels = models.channels_of(network)
    if name in data.SCENES:
        source = data.load_data(name, train_images=1, val_images=1, test_images=4).test
    else:
        source = data.load_everything(name, grey=channels == 1).test
    generator, inputs = torch.Generator().manual_seed(seed), []
    for index in range(min(4, len(source))):
        image, _ = data.split_pair(source[index][0][None, ..., :most, :most], "cpu")
        image = image[:, :channels]
        boxes = example_inputs(network, 1, *image.shape[-2:])[1:]
        inputs.append((image + 0.1 * torch.randn(image.shape, generator=generator), *boxes))
    return inputs


def describe(network: nn.Module, checkpoint: dict) -> dict:
    """What who runs the ONNX file needs to know: classes, size and noise of the training, range of values;
    what eval.py needs to find the images; `multiple`: of pixels, of the sides of a tile, None: no tiles."""
    flags, scale = checkpoint.get("flags") or {}, models.scale_of(network)
    grouped = any(isinstance(module, nn.GroupNorm) for module in network.modules())
    return {"format": FORMAT, "version": VERSION, "form": "float32", "model": checkpoint["record"]["model"],
            "range": [0, 1], "channels": models.channels_of(network), "scale": scale,
            "multiple": None if grouped else getattr(network, "multiple", models.ENCODER_STRIDE),
            "parameters": models.count_parameters(network),
            "macs": models.count_macs(network, checkpoint["size"] // scale),
            **{name: checkpoint.get(name) for name in ("classes", "size", "data", "seed", "splits", "epoch")},
            **{name: flags.get(name) for name in evaluation.OF_TRAINING},
            "made": files.provenance(latency.device_name("cpu"))}


# --- Smaller forms ------------------------------------------------------------------------------------------

class Images(torch.utils.data.Dataset):
    """The images of a dataset, at most `most` pixels high and wide."""

    def __init__(self, dataset, most: int):
        self.dataset, self.most = dataset, most

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        image, label = self.dataset[index]
        return image[..., :self.most, :self.most], label


class Quality:
    """Held-out pictures with noise: to measure PSNR and accuracy on (`test`), to calibrate on (`val`)."""

    def __init__(self, network: nn.Module, checkpoint: dict, name: str):
        flags = evaluation.as_trained(network, checkpoint)
        if not evaluation.is_same_data(name, flags["data"]):
            flags |= {"data": name, "train_folders": None}
        self.levels, self.scale = flags["sigmas"], models.scale_of(network)
        sigmas = tuple(sigma for sigma in self.levels if sigma)[::4] or (0.0,)
        self.protocol = evaluation.Protocol(sigmas, flags["noise"], shave=flags["shave"],
                                            y_only=flags["luma"])
        flags |= {"val_images": CALIBRATION_IMAGES, "test_images": TEST_IMAGES}
        load = lambda split: Images(evaluation.load_split(network, checkpoint, split, self.protocol, flags),
                                    max(MOST_PIXELS, flags["size"]))
        self.val, self.test = load("val"), load("test")

    def calibration(self):
        """The inputs for each image of `val`, all levels of the training in turn."""
        for place, (pixels, label) in enumerate(self.val):
            _, noisy_at = self.protocol.noisy_at(pixels[None], [place], "cpu", self.scale)
            boxes = data.split_labels(torch.as_tensor(label)[None], "cpu")[1]
            noisy = noisy_at(self.levels[place % len(self.levels)]).contiguous()
            yield (noisy,) if boxes is None else (noisy, boxes)

    def measure(self, form: nn.Module) -> dict:
        """PSNR and accuracy, means over all levels of the protocol."""
        measured = evaluation.evaluate(form, data.make_loader(self.test, 16), self.protocol)
        return {name: measured["means"]["all_levels"][name] for name in ("psnr_db", "accuracy")}


def write_form(form: str, source: Path, path: Path, quality: Quality) -> None:
    """Write a smaller form of an ONNX file."""
    onnx = optional("onnx")
    model = int8(source, quality) if form == "int8" else half(onnx.load(source))
    about = {each.key: each.value for each in onnx.load(source).metadata_props}["joint"]
    onnx.helper.set_model_props(model, {"joint": json.dumps({**json.loads(about), "form": form})})
    files.write_file(path, lambda temporary: temporary.write_bytes(model.SerializeToString()))


def half(model):
    """The ONNX model with weights of 16 bit. Each becomes float32 again when onnxruntime loads the file: on a
    CPU it computes as fast as with float32."""
    onnx, casts = optional("onnx"), []
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and math.prod(tensor.dims) > 64:
            name, values = tensor.name, onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype("float16"), f"{name}_half"))
            casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def int8(source: Path, quality: Quality):
    """The ONNX model with convolutions in 8 bit: weights with a scale for each channel, and activations whose
    ranges are those of 99.9 % of the values in the calibration. With the range of all values, one unusual
    picture makes the steps too coarse for the others."""
    onnx, quantisation = optional("onnx"), importlib.import_module("onnxruntime.quantization")
    names = [each.name for each in onnx.load(source).graph.input]

    class Reader(quantisation.CalibrationDataReader):
        inputs = [dict(zip(names, (each.numpy() for each in inputs))) for inputs in quality.calibration()]

        def __len__(self):
            return len(self.inputs)

        def set_range(self, start_index, end_index):
            self.rest = iter(self.inputs[start_index:end_index])

        def get_next(self):
            return next(self.rest, None)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        logging.disable(logging.WARNING)  # it speaks of another way to prepare the file
        try:
            quantisation.quantize_static(
                source, Path(folder) / "int8.onnx", Reader(), per_channel=True,
                op_types_to_quantize=list(QUANTISED), activation_type=quantisation.QuantType.QUInt8,
                weight_type=quantisation.QuantType.QInt8,
                calibrate_method=quantisation.CalibrationMethod.Percentile,
                extra_options={"CalibPercentile": 99.9, "CalibStridedMinMax": 1})  # 1 picture at a time
        finally:
            logging.disable(logging.NOTSET)
        return onnx.load(Path(folder) / "int8.onnx")


# --- Reports ------------------------------------------------------------------------------------------------

def compare(network: nn.Module, paths: dict[str, Path], images: str, size: int, threads: int,
            quality: Quality | None = None) -> list[dict]:
    """Of each form of the network: milliseconds of one image (C, size, size); of those in `paths` also the
    size of the file and the largest difference from the network. With `quality` also PSNR and accuracy, of
    the network and the ONNX files."""
    inputs = [example_inputs(network, *shape) for shape in SHAPES] + pictures(images, network)
    forms = {"eager": network, "folded": latency.fold_batch_norm(network),
             "torch.export": torch.export.load(paths["torch.export"]).module(),
             **{form: OnnxNetwork(path, threads) for form, path in paths.items() if path.suffix == ".onnx"}}
    timed = example_inputs(network, 1, size, size)
    with torch.inference_mode():
        times = latency.interleave([lambda form=form: form(*timed) for form in forms.values()], "cpu")
    rows = [{"form": form, "ms": ms} for form, ms in zip(forms, times.medians_ms)]
    for row in rows:
        form = forms[row["form"]]
        if path := paths.get(row["form"]):
            row |= {"difference": largest_difference(network, form, inputs),
                    "bytes": path.stat().st_size, "file": str(path)}
        finite = row.get("difference", 0) is not None
        if quality and finite and (form is network or isinstance(form, OnnxNetwork)):
            row |= quality.measure(form)
    return rows


def format_rows(rows: list[dict]) -> str:
    """The table of `compare` to read."""
    columns = {"psnr_db": ("PSNR", ".2f"), "accuracy": ("accuracy", ".1%")}
    columns = {name: how for name, how in columns.items() if any(row.get(name) is not None for row in rows)}
    cell = lambda value, how: "-" if value is None else format(value, how)
    lines = [f"{'form':<14}{'ms':>8}" + "".join(f"{head:>10}" for head, _ in columns.values())
             + f"{'difference':>13}{'MB':>8}"]
    for row in rows:
        lines.append(f"{row['form']:<14}{row['ms']:>8.2f}" + "".join(
            f"{cell(row.get(name), how):>10}" for name, (_, how) in columns.items()))
        if "file" in row:
            lines[-1] += f"{cell(row['difference'], '.1e'):>13}{row['bytes'] / 1e6:>8.2f}  {row['file']}"
    return "\n".join(lines)


def picture_size(text: str) -> tuple[int, int]:
    """A type for argparse: 64 or 1280x720 -> width and height in pixels."""
    width, _, height = text.partition("x")
    sides = int(width), int(height or width)
    if not 16 <= min(sides) <= max(sides) <= 65536:
        raise argparse.ArgumentTypeError(f"must be of 16 to 65536 pixels, such as 640 or 640x480, not {text}")
    return sides


def measure_size(path: Path, width: int, height: int, threads: int) -> dict:
    """Milliseconds of a picture through an ONNX file, in tiles if it is large, and the memory: by how much
    the peak of this process grows, which must be a fresh one."""
    torch.set_num_threads(threads)
    before, network = latency.peak_memory_mib("cpu"), OnnxNetwork(path, threads)
    inputs = example_inputs(network, 1, height, width)
    tiled = network.denoises and denoise.in_tiles(network, height, width)
    run_once = lambda: denoise.denoise_tiled(network, inputs[0]) if tiled else network(*inputs)
    ms = latency.measure(run_once, "cpu", warmup=1, repeats=3, seconds=1.0).median_ms
    memory = before and latency.peak_memory_mib("cpu") - before
    return {"width_px": width, "height_px": height, "tiled": tiled, "ms": ms, "memory_mib": memory}


def measure_sizes(path: Path, sizes: list[tuple[int, int]], threads: int) -> list[dict]:
    """`measure_size` of each size in a process of its own; without `ms` where the memory is too small."""
    rows = []
    for size in run.track(sizes, "sizes", len(sizes)):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                rows.append(pool.submit(measure_size, path, *size, threads).result())
            except (BrokenProcessPool, RuntimeError) as error:  # the system ends what takes too much
                if not isinstance(error, BrokenProcessPool) and not files.lacks_memory(error):
                    raise
                rows.append({"width_px": size[0], "height_px": size[1]})
    return rows


def format_sizes(rows: list[dict]) -> str:
    """The table of `measure_sizes` to read."""
    lines = [f"{'picture':<14}{'ms':>10}{'MiB':>8}{'images/s':>10}{'Mpixel/s':>10}"]
    for row in rows:
        name, pixels = "{width_px}x{height_px}".format(**row), row["width_px"] * row["height_px"]
        lines.append(f"{name:<14}" + ("  not enough memory" if "ms" not in row else
            f"{row['ms']:>10.2f}{row['memory_mib'] or float('nan'):>8.0f}{1e3 / row['ms']:>10.1f}"
            f"{pixels / row['ms'] / 1e3:>10.2f}{'  in tiles' if row['tiled'] else ''}"))
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="export.py", usage="python export.py [options]  (--help lists them)",
                    description="Export a trained network to ONNX and torch.export, and check both.",
                    epilog="examples: python export.py; python export.py --threads 4; "
                           "python export.py --checkpoint runs/photos/train/best.pt --images photos")
    add = parser.add_argument
    add("--checkpoint", default="runs/train/best.pt", metavar="FILE",
        help="of train.py (default: %(default)s)")
    add("--output-dir", default="runs/export", metavar="DIR",
        help="folder of the files (default: %(default)s)")
    add("--images", metavar="NAME", help="pictures to check with: a folder, or digits (default: those of the "
        "training where they are here, else digits)")
    add("--forms", nargs="+", choices=FORMS, default=[], help="smaller ONNX files: int8, convolutions in 8 "
        "bit, calibrated on the val images of --images; half, weights in 16 bit (default: none)")
    add("--sizes", nargs="*", type=picture_size, metavar="SIZE", help="also time pictures of these sizes "
        f"through network.onnx, 640 or 640x480; without a size {' '.join(SIZES)} (default: not)")
    add("--threads", type=whole(1, 4096), default=1, metavar="N", help="threads to time with (default: 1)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    with run.Command(parser):
        for name in ("onnx", "onnxscript", "onnxruntime"):
            optional(name)
        device = run.prepare_device("cpu", args.threads, 0)
        network, checkpoint = files.load_checkpoint(args.checkpoint, device)
        folder, known = Path(args.output_dir), checkpoint.get("data") or "digits"
        files.check_folder(folder / "network.onnx")
        here = known in data.SCENES or Path(known).is_dir()
        if args.forms and not (args.images or here):
            raise ValueError(f"--forms needs pictures as in the training, and {known} is not here: name a "
                             "folder with --images.")
        images = args.images or (known if here else "digits")
        size, about = checkpoint["size"] // models.scale_of(network), describe(network, checkpoint)
        quality = Quality(network, checkpoint, images) if args.forms else None
        run.say(f"Exporting {about['model']}; checked on random images and on pictures of {images} ...")
        paths = {"torch.export": folder / "network.pt2", "onnxruntime": folder / "network.onnx"}
        program = export_program(network)
        write_program(program, paths["torch.export"])
        write_onnx(program, paths["onnxruntime"], output_names(network), about)
        for form in dict.fromkeys(args.forms):
            paths[form] = folder / f"network.{form}.onnx"
            write_form(form, paths["onnxruntime"], paths[form], quality)
        rows = compare(network, paths, images, size, args.threads, quality)
        run.say(f"one image of {size}x{size} px, threads: {args.threads}, {latency.device_name('cpu')}\n"
                + format_rows(rows))
        if quality:
            levels = ", ".join(data.format_sigmas(quality.protocol.sigmas))
            run.say(f"PSNR and accuracy: means over sigma {levels} of {len(quality.test)} test images, of at "
                    f"most {quality.test.most} px a side")
        sizes = None if args.sizes is None else measure_sizes(
            paths["onnxruntime"], args.sizes or [picture_size(size) for size in SIZES], args.threads)
        if sizes:
            run.say(format_sizes(sizes))
        files.write_json(folder / "export.json", {
            "format": "joint-export", "version": 1, "network": about, "threads": args.threads,
            "size_px": size, "images": images, "forms": rows, "sizes": sizes})
        differences = {row["form"]: row["difference"] for row in rows if "file" in row}
        if broken := [form for form, difference in differences.items() if difference is None]:
            sys.exit(f"export.py: outputs of {' and '.join(broken)} are not finite: do not use the file.")
        if wrong := [form for form, difference in differences.items()
                     if form not in FORMS and difference > LARGEST_DIFFERENCE]:
            sys.exit(f"export.py: the outputs of {' and '.join(wrong)} differ from PyTorch's by more than "
                     f"{LARGEST_DIFFERENCE:g}: do not use the file.")


if __name__ == "__main__":
    main()
