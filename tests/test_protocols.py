"""Evaluation over a split: every image once, equal weights, no graph per shape."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from small_runs import tiny_config, tiny_data, tiny_network

from diagnostics.errors import InputError
from vggrepro import protocols, trainer
from vggrepro.cli import main
from vggrepro.data_source import open_data, open_index
from vggrepro.evaluated_net import doubtful_classes, net_of_file, net_of_run
from vggrepro.evaluation_record import PROTOCOLS
from vggrepro.initializers import initial_parameters
from vggrepro.model import network_of
from vggrepro.posteriors import PosteriorMean
from vggrepro.protocols import CompiledNet
from vggrepro.resampling import rescaled_size
from vggrepro.run_directory import RunDirectory
from vggrepro.whole_images import WholeImages, image_sizes, rescaled_sizes

COMPILED: dict = {}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A run that has learnt something, and one of another net and scale as if it had."""
    place = tmp_path_factory.mktemp("runs")
    config = tiny_config(data, steps=30, eval_every=0, checkpoint_every=30)
    trainer.train(config, place / "A")
    other = tiny_config(data, arch="B", scale_min=36, scale_max=60, init="he-normal")
    drawn = initial_parameters(tiny_network(other), "he-normal", seed=1)
    drawn["predictions/kernel"] *= np.float32(0.01)
    manifest = json.loads((place / "A" / "manifest.json").read_text())
    with RunDirectory.create(place / "B", other.to_dict(), manifest) as run:
        run.save_checkpoint(30, {f"params/{name}": array for name, array in drawn.items()}, 1)
    return place / "A", place / "B"


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Equal nets are compiled once for all tests here."""

    def made(net, protocol):
        key = (net.description["weights_sha256"], net.network, net.preprocessing, protocol)
        if key not in COMPILED:
            COMPILED[key] = CompiledNet(net, protocol)
        return COMPILED[key]

    monkeypatch.setattr(protocols, "CompiledNet", made)


@pytest.fixture(scope="module")
def index(data):
    return open_data(tiny_config(data), lambda text: None).validation.index


@pytest.fixture(scope="module")
def nets(runs):
    return [net_of_run(run, pytest.fail) for run in runs]


def posteriors(net, side, index, protocol):
    """Posteriors [n, classes] of one net at one scale, in float64."""
    table = np.full([len(index), net.network.classes], np.nan)
    sizes = None if protocol == "center" else image_sizes(index)
    for ids, scores in protocols.CompiledNet(net, protocol).over(index, side, sizes, 16):
        assert np.isnan(table[ids]).all()
        table[ids] = np.exp(scores.astype(np.float64))
    assert not np.isnan(table).any()
    return table


def errors_of(table, labels):
    own = table[np.arange(len(labels)), labels]
    rank = (table > own[:, None]).sum(axis=1)
    return {
        "top1_error": 100 * np.mean(rank >= 1),
        "top5_error": 100 * np.mean(rank >= 5),
        "loss": -np.log(own).mean(),
    }


# ---------------------------------------------------------------- images


def test_whole_images_are_those_of_tensorflow_s_own_resize(nets, index):
    sizes = image_sizes(index)
    assert len({tuple(size) for size in sizes.tolist()}) >= 5
    stream = WholeImages(index, nets[0].preprocessing, sizes, 50, 10**6, 4)
    seen = []
    for images, ids in stream:
        for image, example in zip(images.numpy(), ids, strict=True):
            content = tf.io.read_file(f"{index.root}/{index.paths[example]}")
            pixels = tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE")
            target = rescaled_size(tf.cast(tf.shape(pixels)[:2], tf.float32), 50.0).numpy()
            expected = tf.image.resize(pixels, target.astype(int), "bilinear", antialias=True)
            expected -= np.array(nets[0].preprocessing.mean_rgb, np.float32)
            assert image.shape == expected.shape and min(image.shape[:2]) == 50
            assert image == pytest.approx(expected.numpy(), abs=0.02)
            seen.append(example)
    assert sorted(seen) == list(range(9))


def test_a_whole_image_s_centre_is_the_centre_crop(nets, index):
    side, preprocessing = 50, nets[0].preprocessing
    for images, ids in WholeImages(index, preprocessing, image_sizes(index), side, 10**6, 1):
        content = tf.io.read_file(f"{index.root}/{index.paths[ids[0]]}")
        crop = preprocessing.evaluation_image(content, side).numpy()
        top, left = ((extent - 32) // 2 for extent in images.shape[1:3])
        whole = images.numpy()[0, top : top + 32, left : left + 32]
        assert whole == pytest.approx(crop, abs=1.0)  # grey levels; decoded by another way
        assert np.abs(whole - crop).mean() < 0.1


@given(
    st.lists(st.tuples(st.integers(20, 90), st.integers(20, 90)), min_size=1, max_size=60),
    st.integers(16, 64),
    st.integers(1, 20_000),
    st.integers(1, 7),
)
def test_every_example_comes_once_in_batches_of_one_shape(sizes, side, pixels, images):
    sizes = np.array(sizes, np.int32)
    plan = WholeImages(None, None, sizes, side, pixels, images).plan()
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(sizes)))
    targets = rescaled_sizes(sizes, side)
    for ids in plan:
        shapes = {tuple(target) for target in targets[ids].tolist()}
        assert len(shapes) == 1 and len(ids) <= images
        assert len(ids) == 1 or len(ids) * np.prod(shapes.pop()) <= pixels


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 1000))
def test_sizes_are_rounded_as_in_the_graph(height, width, side):
    expected = rescaled_size(tf.constant([height, width], tf.float32), float(side)).numpy()
    assert rescaled_sizes(np.array([[height, width]]), side)[0].tolist() == expected.tolist()


def test_a_batch_is_as_full_as_may_be():
    sizes = np.array([[40, 60]] * 7 + [[60, 40]] * 3, np.int32)
    plan = WholeImages(None, None, sizes, 20, 4 * 20 * 30, 16).plan()
    assert [ids.tolist() for ids in plan] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]


# ---------------------------------------------------------------- posteriors


def test_the_mean_over_passes_and_its_errors():
    random = np.random.default_rng(0)
    table = random.dirichlet(np.ones(8), size=(3, 40))
    labels = random.integers(0, 8, 40)
    mean = PosteriorMean(40, 8)
    for one in table:
        order = random.permutation(40)
        for ids in np.split(order, [7, 8, 30]):
            mean.add(ids, np.log(one[ids]).astype(np.float32))
        mean.end_pass()
    assert mean.errors(labels.astype(np.int32)) == pytest.approx(
        errors_of(table.mean(axis=0), labels), rel=1e-5
    )


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 1, 2], [0, 0, 1, 2]])
def test_an_example_that_is_missed_or_doubled_is_a_fault(ids):
    mean = PosteriorMean(3, 2)
    for example in ids:
        mean.add(np.array([example]), np.log(np.full([1, 2], 0.5, np.float32)))
    with pytest.raises(ValueError, match="did not come exactly once"):
        mean.end_pass()


def test_equal_posteriors_score_at_chance_and_nan_is_wrong():
    mean = PosteriorMean(12, 6)
    mean.add(np.arange(12), np.full([12, 6], np.log(1 / 6), np.float32))
    mean.end_pass()
    labels = np.tile(np.arange(6), 2).astype(np.int32)
    found = mean.errors(labels)
    assert found["top1_error"] == pytest.approx(100 * 5 / 6)
    assert found["top5_error"] == pytest.approx(100 / 6)
    assert found["loss"] == pytest.approx(np.log(6))
    broken = PosteriorMean(12, 6)
    broken.add(np.arange(12), np.full([12, 6], np.nan, np.float32))
    broken.end_pass()
    assert broken.errors(labels)["top5_error"] == 100.0


def test_a_posterior_too_small_for_a_number_keeps_its_logarithm():
    mean = PosteriorMean(1, 2)
    mean.add(np.array([0]), np.array([[0.0, -500.0]], np.float32))
    mean.end_pass()
    assert mean.errors(np.array([1], np.int32))["loss"] == pytest.approx(500.0)


# ---------------------------------------------------------------- protocols


def test_the_centre_crop_gives_what_training_recorded(runs, nets, index):
    recorded = json.loads((runs[0] / "manifest.json").read_text())["final_metrics"]
    found = protocols.evaluate(nets[:1], [(nets[0].own_scale,)], index, "center", 4)
    assert found["images"] == recorded["val_images"] == 9
    assert found["top1_error"] == recorded["val_top1_error"]
    assert found["top5_error"] == recorded["val_top5_error"]
    assert found["loss"] == pytest.approx(recorded["val_loss"], rel=1e-5)


@pytest.mark.parametrize("protocol", ["center", "dense", "multicrop"])
def test_scales_and_nets_are_averaged_with_equal_weights(nets, index, protocol):
    scales = [(37, 50), (40,)] if protocol == "dense" else [(37,), (40,)]
    tables = [
        posteriors(net, side, index, protocol)
        for net, sides in zip(nets, scales, strict=True)
        for side in sides
    ]
    found = protocols.evaluate(nets, scales, index, protocol, 8)
    expected = errors_of(np.mean(tables, axis=0), index.labels)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found["images_per_second"] == pytest.approx(9 / found["seconds"])


def test_both_is_the_mean_of_dense_and_multi_crop(nets, index):
    parts = [posteriors(nets[0], 50, index, protocol) for protocol in ("dense", "multicrop")]
    both = posteriors(nets[0], 50, index, "both")
    assert both == pytest.approx(np.mean(parts, axis=0), rel=1e-4, abs=1e-9)
    assert np.abs(parts[0] - parts[1]).max() > 1e-3


def test_the_size_of_a_batch_changes_nothing(nets, index):
    sizes = image_sizes(index)
    for protocol in ("dense", "multicrop"):
        compiled = protocols.CompiledNet(nets[0], protocol)
        tables = []
        for size in (1, 64):
            rows = {i: row for ids, b in compiled.over(index, 45, sizes, size)
                    for i, row in zip(ids.tolist(), b, strict=True)}  # fmt: skip
            tables.append(np.stack([rows[i] for i in range(9)]))
        assert tables[0] == pytest.approx(tables[1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_graph_is_traced_for_a_shape(nets, index, protocol):
    compiled = protocols.CompiledNet(nets[0], protocol)
    shapes = [(32, 32)] * 2 if protocol == "center" else [(32, 40), (45, 33), (64, 96)]
    for height, width in shapes:
        for count in (1, 3):
            compiled.scores(tf.zeros([count, height, width, 3]))
    assert compiled.scores.experimental_get_tracing_count() == 1


def test_the_paper_s_scales(nets):
    # 32 of 224 is 5 of 32 pixels; the jittered net takes the ends and the middle.
    assert [net.own_scales for net in nets] == [(32, 37, 42), (36, 48, 60)]
    assert [net.own_scale for net in nets] == [37, 48]


def test_progress_reaches_the_end(nets, index):
    told = []
    protocols.evaluate(nets, [(40,), (40, 50)], index, "dense", 4, lambda *said: told.append(said))
    done = [(now, total) for _, now, total in told if total]
    assert done[-1] == (27, 27) and [now for now, _ in done] == sorted(now for now, _ in done)
    assert "net B, dense, Q=50" in told[-1][0] and "images/s" in told[-1][0]


def test_a_scale_below_the_crop_and_other_classes_are_told(nets, index):
    with pytest.raises(InputError, match="scale 31 is below the net's image size 32"):
        protocols.evaluate(nets[:1], [(31,)], index, "dense", 4)
    other = dict(nets[0].parameters)
    other["predictions/kernel"] = np.zeros([205, 7], np.float32)
    other["predictions/bias"] = np.zeros(7, np.float32)
    odd = dataclasses.replace(nets[0], network=network_of("A", other, 32), parameters=other)
    with pytest.raises(InputError, match="net A tells 7 classes apart, .* has 3"):
        protocols.evaluate([odd], [(37,)], index, "center", 4)


def test_a_damaged_image_is_named(nets, data, tmp_path):
    shutil.copytree(data, tmp_path / "images")
    bad = sorted((tmp_path / "images" / "val").rglob("*.JPEG"))[4]
    bad.write_bytes(bad.read_bytes()[:300])
    damaged = open_data(tiny_config(tmp_path / "images"), lambda text: None).validation.index
    for protocol in ("center", "dense"):
        with pytest.raises(InputError, match=bad.name):
            protocols.evaluate(nets[:1], [(37,)], damaged, protocol, 4)


def test_shards_give_what_their_files_give(nets, data, index, tmp_path):
    shards = tmp_path / "shards"
    assert main(["data", "build", str(data), str(shards)]) == 0
    packed = open_index(str(shards), "val")
    assert packed.records is not None and packed.fingerprint == index.fingerprint
    for protocol in ("center", "dense"):
        compiled = protocols.CompiledNet(nets[0], protocol)
        pair = []
        for one in (index, packed):
            passed = compiled.over(one, 45, image_sizes(one), 8)
            pair.append({i: row for ids, rows in passed for i, row in zip(ids, rows, strict=True)})
        assert pair[0].keys() == pair[1].keys() == set(range(9))
        assert all(np.array_equal(pair[0][i], pair[1][i]) for i in range(9))


# ---------------------------------------------------------------- the command


def evaluate_json(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_s_json_and_what_it_keeps(runs, nets, index, capsys):
    found = evaluate_json(capsys, runs[0], "--scales", "37,50", "--batch-size", "8")
    assert found.keys() >= {
        *("protocol", "scales", "images", "top1_error", "top5_error", "loss"),
        *("images_per_second", "split", "classes", "nets"),
    }
    assert (found["protocol"], found["scales"], found["images"]) == ("dense", [37, 50], 9)
    expected = protocols.evaluate(nets[:1], [(37, 50)], index, "dense", 8)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    kept = json.loads((runs[0] / "evaluations" / "dense-37-50.json").read_text())
    assert kept == found
    assert kept["nets"][0]["step"] == 30 and kept["nets"][0]["arch"] == "A"


def test_several_runs_are_fused_each_at_its_own_scales(runs, nets, index, capsys):
    found = evaluate_json(capsys, *runs, "--scales", "multi", "--protocol", "center")
    assert found["scales"] == []
    assert [net["scales"] for net in found["nets"]] == [[32, 37, 42], [36, 48, 60]]
    scales = [net.own_scales for net in nets]
    expected = protocols.evaluate(nets, scales, index, "center", 8)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert list((runs[0] / "evaluations").glob("center-own-scales-fusion-*.json"))


def test_pools_may_round_up_as_in_caffe(runs, capsys):
    down = evaluate_json(capsys, runs[0], "--scales", "50")
    up = evaluate_json(capsys, runs[0], "--scales", "50", "--pool-rounding", "up")
    assert (down["pool_rounding"], up["pool_rounding"]) == ("down", "up")
    assert down["loss"] != up["loss"]
    assert (runs[0] / "evaluations" / "dense-50-pools-up.json").exists()


def test_the_training_split_is_marked_as_such(runs, capsys):
    found = evaluate_json(capsys, runs[0], "--protocol", "center", "--split", "train")
    assert (found["split"], found["images"]) == ("train", 36)
    assert (runs[0] / "evaluations" / "center-37-train.json").exists()


def test_people_see_errors_with_intervals_and_speed(runs, capsys):
    assert main(["evaluate", str(runs[0]), "--protocol", "center"]) == 0
    shown = capsys.readouterr().out
    assert "A: center, Q = 37; 9 images of val, 3 classes" in shown
    assert "top-1 error" in shown and "95 % interval" in shown and "images/s" in shown
    assert "validation images also steered the learning-rate schedule" in shown


def test_a_file_of_weights_is_evaluated_as_the_run_it_came_from(runs, data, nets, capsys, tmp_path):
    # The run's own weights, rewritten as a net that wants BGR minus the authors' mean.
    mean = np.array(nets[0].preprocessing.mean_rgb, np.float32)
    authors = np.array([123.68, 116.779, 103.939], np.float32)
    parameters = dict(nets[0].parameters)
    kernel = parameters["block1_conv1/kernel"]
    parameters["block1_conv1/kernel"] = kernel[:, :, ::-1].copy()
    save_file(parameters, tmp_path / "w.safetensors")
    options = ("--weights", tmp_path / "w.safetensors", "--arch", "A", "--data", data)
    found = evaluate_json(capsys, *options, "--preprocess", "caffe", "--protocol", "center")
    own = evaluate_json(capsys, runs[0], "--protocol", "center")
    assert found["scales"] == own["scales"] == [37]
    # Only the mean differs, so the answers do a little.
    assert found["loss"] == pytest.approx(own["loss"], rel=0.2)
    assert np.abs(mean - authors).max() > 1
    wrong = evaluate_json(capsys, *options, "--preprocess", "torch", "--protocol", "center")
    assert abs(wrong["loss"] - own["loss"]) > abs(found["loss"] - own["loss"])


def test_classes_that_may_be_in_another_order_are_told(nets, index):
    assert doubtful_classes(nets, index) == []
    renamed = dataclasses.replace(index, class_names=("x", "y", "z"))
    assert len(doubtful_classes(nets[:1], renamed)) == 1
    assert "have other names than those" in doubtful_classes(nets[:1], renamed)[0]
    network = dataclasses.replace(nets[0].network, classes=1000)
    released = dataclasses.replace(nets[0], network=network, description={"run_dir": None})
    assert "are not named by their WordNet ids" in doubtful_classes([released], index)[0]
    wordnet = dataclasses.replace(index, class_names=("n01440764", "n01443537"))
    assert doubtful_classes([released], wordnet) == []


def test_a_manifest_without_what_an_evaluation_needs_is_told(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    file = tmp_path / "run" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["data"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest.json is not whole, or of another version"):
        net_of_run(tmp_path / "run", pytest.fail)


def test_weights_of_unknown_preprocessing_are_refused(nets, tmp_path):
    save_file(dict(nets[0].parameters), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="does not say what its net was trained to see"):
        net_of_file(tmp_path / "w.safetensors", None, None)
    with pytest.raises(InputError, match="holds net A, not D"):
        net_of_file(tmp_path / "w.safetensors", "D", "caffe")
    assert net_of_file(tmp_path / "w.safetensors", "A-LRN", "caffe").network.arch == "A-LRN"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give run directories or --weights FILE"),
        (["RUN", "--weights", "w.h5"], "give run directories or --weights FILE"),
        (["RUN", "--arch", "D"], "--arch and --preprocess go with --weights"),
        (["--weights", "w.h5"], "--weights needs --data"),
        (["RUN", "--scales", "large"], "--scales 'large' is no list of pixels"),
        (["RUN", "--scales", "10"], "scale 10 is below"),
        (["RUN", "--scales", "2560"], "scale 2560 is more than 16 times the net's image size 32"),
        (["RUN", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["nowhere"], "nowhere is not a run directory"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(runs, capsys, arguments, message):
    words = [str(runs[0]) if word == "RUN" else word for word in arguments]
    assert main(["evaluate", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
