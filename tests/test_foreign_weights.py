"""Files of weights in other people's layouts give other people's answers."""

from __future__ import annotations

import pickle
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import save_file

from diagnostics.errors import InputError
from vggrepro.foreign_weights import PREPROCESS, read_weights
from vggrepro.initializers import initial_parameters
from vggrepro.keras_export import keras_model, save_weights
from vggrepro.model import build_network, forward, network_of
from vggrepro.torch_file import read_torch_file

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)
WITHOUT_TORCH = "PyTorch is not installed (pip install torch); the other framework's forward"


def narrow(arch="D", classes=5):
    """64 pixels, so that fc1 sees a 2x2 map and the order of its inputs matters."""
    network = build_network(arch, width=0.05, image_size=64, classes=classes)
    parameters = initial_parameters(network, "he-normal", seed=3)
    random = np.random.default_rng(7)
    for name, array in parameters.items():
        if name.endswith("/bias"):
            parameters[name] = random.normal(0, 0.5, array.shape).astype(np.float32)
    parameters["predictions/kernel"] *= np.float32(0.01)  # or the softmax hides differences
    return network, parameters


def answers(file, preprocess):
    """Posteriors of IMAGES by our net with the weights of a file."""
    form = PREPROCESS[preprocess]
    stored = read_weights(file)
    parameters = stored.for_input(form)
    network = network_of(stored.arch, parameters)
    assert network.image_size == 64
    images = tf.constant(IMAGES - np.array(form.mean_rgb, np.float32))
    return tf.nn.softmax(forward(network, parameters, images)).numpy()


def save_legacy_h5(file, network, parameters):
    """As the files that `keras.applications` downloads: layer_names, weight_names."""
    with h5py.File(file, "w") as top:
        names = ["input_1", *(layer.name for layer in network.layers)]
        top.attrs["layer_names"] = [name.encode() for name in names]
        for name in names:
            group = top.create_group(name)
            stored = [f"{name}/{p}" for p in ("kernel", "bias") if f"{name}/{p}" in parameters]
            group.attrs["weight_names"] = [f"{weight}:0".encode() for weight in stored]
            for weight in stored:
                group[f"{weight}:0"] = parameters[weight]


@pytest.mark.parametrize("arch", ["A", "C", "D", "E"])
@pytest.mark.parametrize("form", ["legacy", "keras 3", "whole model"])
def test_a_keras_file_gives_what_keras_gives(tmp_path, arch, form):
    network, parameters = narrow(arch)
    model = keras_model(network)
    save_weights(network, parameters, tmp_path / "w.weights.h5")
    model.load_weights(tmp_path / "w.weights.h5")
    file = tmp_path / {"keras 3": "w.weights.h5"}.get(form, "other.h5")
    if form == "legacy":
        save_legacy_h5(file, network, parameters)
    elif form == "whole model":
        model.save(file)
    stored = read_weights(file)
    assert (stored.layout, stored.arch) == ("keras", arch)
    assert stored.parameters.keys() == parameters.keys()
    assert all(np.array_equal(stored.parameters[n], a) for n, a in parameters.items())
    # The other side's own preprocessing: BGR minus the mean.
    expected = model(keras.applications.vgg16.preprocess_input(IMAGES.copy())).numpy()
    assert expected.min() > 0.001 and expected.max() < 0.999
    assert answers(file, "caffe") == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_keras_applications_own_net_and_file(tmp_path):
    model = keras.applications.VGG16(weights=None, input_shape=(64, 64, 3), classes=5)
    assert [layer.name for layer in model.layers if layer.weights][-3:] == [
        *("fc1", "fc2", "predictions")
    ]
    random = np.random.default_rng(1)
    for layer in model.layers:
        if layer.weights:
            kernel, bias = layer.get_weights()
            layer.set_weights([kernel * 1.4, random.normal(0, 0.1, bias.shape)])
    model.save(tmp_path / "model.h5")
    model.save_weights(tmp_path / "only.weights.h5")
    seen = keras.applications.vgg16.preprocess_input(IMAGES.copy())
    expected = model(seen).numpy()
    assert expected.std() > 1e-3
    for file in ("model.h5", "only.weights.h5"):
        assert answers(tmp_path / file, "caffe") == pytest.approx(expected, rel=1e-3, abs=1e-6)


def torch_net(torch, arch, network):
    """torchvision's VGG, written down anew: features, pooling to one size, classifier."""
    features, channels = [], 3
    for layer in network.layers:
        if layer.name.endswith("pool"):
            features.append(torch.nn.MaxPool2d(2, 2))
        elif "conv" in layer.name:
            kernel, _, inputs, outputs = layer.kernel_shape
            features += [
                torch.nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2),
                torch.nn.ReLU(inplace=True),
            ]
            channels = outputs
    hidden = network.weight_layers[-2].kernel_shape[1]
    classifier = [
        *(torch.nn.Linear(channels * 4, hidden), torch.nn.ReLU(True), torch.nn.Dropout()),
        *(torch.nn.Linear(hidden, hidden), torch.nn.ReLU(True), torch.nn.Dropout()),
        torch.nn.Linear(hidden, network.classes),
    ]
    net = torch.nn.Module()
    net.features = torch.nn.Sequential(*features)
    net.classifier = torch.nn.Sequential(*classifier)
    torch.manual_seed(5)
    for parameter in net.parameters():
        spread = 0.3 if parameter.ndim == 1 else (2.0 / parameter[0].numel()) ** 0.5
        torch.nn.init.normal_(parameter, 0.0, spread)
    return net.eval()


def torch_answers(torch, net):
    pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255.0
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    spread = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        maps = net.features((pixels - mean) / spread)
        return torch.softmax(net.classifier(torch.flatten(maps, 1)), 1).numpy()


@pytest.mark.parametrize("arch", ["A", "B", "D", "E"])
@pytest.mark.parametrize("ending", ["safetensors", "pth", "old.pth", "nested.pt", "other.pt"])
def test_a_torchvision_file_gives_what_pytorch_gives(tmp_path, arch, ending):
    torch = pytest.importorskip("torch", reason=WITHOUT_TORCH)
    network, _ = narrow(arch)
    net = torch_net(torch, arch, network)
    file = tmp_path / f"w.{ending}"
    state = net.state_dict()
    if ending == "safetensors":
        save_file({name: tensor.numpy() for name, tensor in state.items()}, file)
    elif ending.endswith(".pt"):
        key = {"nested.pt": "state_dict", "other.pt": "model"}[ending]
        torch.save({"epoch": 3, key: {f"module.{n}": t for n, t in state.items()}}, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=ending != "old.pth")
    stored = read_weights(file)
    assert (stored.layout, stored.arch) == ("torchvision", arch)
    expected = torch_answers(torch, net)
    assert expected.std() > 0.05
    assert answers(file, "torch") == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_reader_agrees_with_pytorch_s_own_on_views_and_types(tmp_path):
    torch = pytest.importorskip("torch", reason=WITHOUT_TORCH)
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "view": base[1:, ::2],
        "transposed": base.T,
        "same storage": base[2],
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "whole number": torch.tensor(7),
        "parameter": torch.nn.Parameter(base[:2]),
    }
    for new in (True, False):
        torch.save(state, tmp_path / "s.pth", _use_new_zipfile_serialization=new)
        read = read_torch_file(tmp_path / "s.pth")
        expected = torch.load(tmp_path / "s.pth", weights_only=True)
        assert read.keys() == expected.keys()
        for name, array in read.items():
            other = expected[name].detach()
            if other.dtype == torch.bfloat16:  # which PyTorch does not hand to NumPy
                assert array.dtype.name == "bfloat16"
                array, other = array.astype(np.float32), other.float()
            assert array.dtype == other.numpy().dtype and np.array_equal(array, other.numpy())


def torchvision_arrays(classes=5):
    """Arrays in torchvision's layout made without PyTorch, from a narrow D."""
    _, parameters = narrow("D", classes)
    arrays, place = {}, 0
    for name in [n for n in parameters if n.endswith("/kernel") and "conv" in n]:
        prefix = f"features.{place}"
        arrays[f"{prefix}.weight"] = parameters[name].transpose(3, 2, 0, 1).copy()
        arrays[f"{prefix}.bias"] = parameters[name.replace("kernel", "bias")]
        place += 3 if _pool_behind(name) else 2
    maps = parameters["fc1/kernel"].reshape(2, 2, -1, parameters["fc1/kernel"].shape[1])
    arrays["classifier.0.weight"] = maps.transpose(3, 2, 0, 1).reshape(maps.shape[3], -1).copy()
    arrays["classifier.0.bias"] = parameters["fc1/bias"]
    for number, layer in ((3, "fc2"), (6, "predictions")):
        arrays[f"classifier.{number}.weight"] = parameters[f"{layer}/kernel"].T.copy()
        arrays[f"classifier.{number}.bias"] = parameters[f"{layer}/bias"]
    return arrays, parameters


def _pool_behind(name):
    return name in {f"block{b}_conv{c}/kernel" for b, c in ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3))}


def test_torchvision_s_order_of_fc1_s_inputs_is_turned(tmp_path):
    arrays, parameters = torchvision_arrays()
    save_file(arrays, tmp_path / "w.safetensors")
    stored = read_weights(tmp_path / "w.safetensors")
    assert all(np.array_equal(stored.parameters[n], a) for n, a in parameters.items())


def test_the_input_s_form_is_folded_into_the_first_kernel_only():
    kernel = np.random.default_rng(2).normal(size=(3, 3, 3, 4)).astype(np.float32)
    pixels = np.random.default_rng(3).normal(0, 60, (1, 8, 8, 3)).astype(np.float32)
    bgr = tf.nn.conv2d(pixels[..., ::-1], kernel, 1, "SAME").numpy()
    ours = tf.nn.conv2d(pixels, PREPROCESS["caffe"].as_ours(kernel), 1, "SAME").numpy()
    assert ours == pytest.approx(bgr, rel=1e-4, abs=1e-3)
    divided = pixels / (np.array([0.229, 0.224, 0.225], np.float32) * 255)
    expected = tf.nn.conv2d(divided, kernel, 1, "SAME").numpy()
    ours = tf.nn.conv2d(pixels, PREPROCESS["torch"].as_ours(kernel), 1, "SAME").numpy()
    assert ours == pytest.approx(expected, rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------- what is refused


class Attack:
    """Unpickles into a call that leaves a file behind."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("container", ["zip", "stream", "bare"])
def test_a_pickle_that_calls_something_is_refused_and_not_run(tmp_path, container):
    content = pickle.dumps({"features.0.weight": Attack(tmp_path / "harm")}, protocol=2)
    file = tmp_path / "evil.pth"
    if container == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("evil/data.pkl", content)
    elif container == "stream":
        head = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001)]
        file.write_bytes(b"".join([*head, pickle.dumps({"little_endian": True}, 2), content]))
    else:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"asks for (io|builtins)\.open to be run"):
        read_weights(file)
    assert not (tmp_path / "harm").exists()
    pickle.loads(content)
    assert (tmp_path / "harm").exists()  # the attack works on whoever lets it


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04cut", pickle.dumps([1, 2])])
def test_rubbish_is_told_in_a_line(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputError, match="is not a PyTorch checkpoint, or is damaged"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(("place", "value"), [(10, 99), (8, 1), (6, 92)])
def test_an_archive_that_cannot_be_unpacked_is_told(tmp_path, place, value):
    """Compression that nobody knows, encryption, a version to come."""
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("w/data.pkl", pickle.dumps({}, 2))
    content = bytearray((tmp_path / "w.pth").read_bytes())
    content[content.rindex(b"PK\x01\x02") + place] = value
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputError, match="is not a PyTorch checkpoint, or is damaged"):
        read_weights(tmp_path / "w.pth")


def test_a_cut_checkpoint_is_told(tmp_path):
    torch = pytest.importorskip("torch", reason=WITHOUT_TORCH)
    for new in (True, False):
        torch.save({"a": torch.zeros(1000)}, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
        whole = (tmp_path / "w.pth").read_bytes()
        for share in (0.2, 0.5, 0.9):
            (tmp_path / "w.pth").write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(InputError):
                read_torch_file(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update({"features.1.running_mean": a["features.0.bias"]}), "batch norm"),
        (lambda a: a.pop("classifier.6.weight"), "classifier.6 has no kernel"),
        (lambda a: a.pop("features.0.bias"), "features.0 has no bias"),
        (lambda a: [a.pop(f"features.28.{p}") for p in ("weight", "bias")], "12 convolutions"),
        (lambda a: [a.pop(f"classifier.3.{p}") for p in ("weight", "bias")], "2 fully connected"),
        (lambda a: a.update({"features.2.bias": np.zeros(9, np.float32)}), "does not fit behind"),
        (lambda a: a.update({"classifier.3.bias": np.zeros(9, np.float32)}), "does not fit"),
        (lambda a: a.update({"head.weight": a["features.0.bias"]}), "'head.weight' has no place"),
    ],
)
def test_a_file_that_is_no_net_of_the_paper_is_told(tmp_path, change, message):
    arrays, _ = torchvision_arrays()
    change(arrays)
    save_file(arrays, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=message):
        read_weights(tmp_path / "w.safetensors")


def test_weights_without_their_fully_connected_layers_are_told(tmp_path):
    network, parameters = narrow("D")
    kept = {n: a for n, a in parameters.items() if n.startswith("block")}
    save_legacy_h5(tmp_path / "notop.h5", network, kept)
    with pytest.raises(InputError, match="13 convolutions and 0 fully connected.*'notop'"):
        read_weights(tmp_path / "notop.h5")


@pytest.mark.parametrize("name", ["w.ckpt", "w.safetensors", "w.h5", "missing.pth"])
def test_unreadable_files_are_told(tmp_path, name):
    if not name.startswith("missing"):
        (tmp_path / name).write_bytes(b"rubbish")
    with pytest.raises(InputError, match=name):
        read_weights(tmp_path / name)
