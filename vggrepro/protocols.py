"""The paper's evaluation protocols over a split: centre, dense, multi-crop, both.

Posteriors are averaged over views, then over scales, then over nets (fusion), all with
equal weights, so one mean over (net, scale) passes does it. Validation images also steer
the learning-rate schedule; the paper's did as well.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from diagnostics.errors import InputError
from vggrepro.dataset import EvaluationStream
from vggrepro.dense import dense_log_posteriors
from vggrepro.evaluated_net import EvaluatedNet
from vggrepro.example_index import ExampleIndex
from vggrepro.model import forward
from vggrepro.multicrop import GRID, multicrop_log_posteriors
from vggrepro.posteriors import PosteriorMean
from vggrepro.whole_images import WholeImages, image_sizes, unreadable

_LARGEST_SCALE = 16  # times the net's image size; the paper's largest is 2.3 times

Progress = Callable[[str, int, int], None]
Scored = Iterator[tuple[np.ndarray, np.ndarray]]  # example ids, log posteriors


def evaluate(
    nets: Sequence[EvaluatedNet],
    scales: Sequence[Sequence[int]],
    index: ExampleIndex,
    protocol: str,
    batch_size: int,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Errors of one net, or of the fusion of several, over every image of a split.

    Args:
      scales: shorter sides Q, pixels, for each net.
      protocol: one of `evaluation_record.PROTOCOLS`.
      batch_size: views of the net's own size that are in memory at a time.

    Returns:
      images, top1_error, top5_error (percent), loss, seconds, images_per_second (images
      of the split, whatever the number of scales and nets).

    Raises:
      InputError: a scale below the net's image size, classes that do not fit the data,
        or an image that cannot be read.
    """
    for net, sides in zip(nets, scales, strict=True):
        _check(net, sides, index)
    mean = PosteriorMean(len(index), nets[0].network.classes)
    passes = sum(map(len, scales))
    sizes = None
    if protocol != "center":
        progress("sizes of the images", 0, 0)
        sizes = image_sizes(index)
    started = time.perf_counter()
    done = 0
    for net, sides in zip(nets, scales, strict=True):
        compiled = CompiledNet(net, protocol)
        for side in sides:
            for ids, log_posteriors in compiled.over(index, side, sizes, batch_size):
                mean.add(ids, log_posteriors)
                done += len(ids)
                rate = done / passes / (time.perf_counter() - started)
                what = f"net {net.network.arch}, {protocol}, Q={side}, {rate:.3g} images/s"
                progress(what, done, len(index) * passes)
            mean.end_pass()
    seconds = time.perf_counter() - started
    return {
        "images": len(index),
        **mean.errors(index.labels),
        "seconds": seconds,
        "images_per_second": len(index) / seconds,
    }


def _check(net: EvaluatedNet, sides: Sequence[int], index: ExampleIndex) -> None:
    classes = len(index.class_names)
    if net.network.classes != classes:
        raise InputError(
            f"net {net.network.arch} tells {net.network.classes} classes apart, "
            f"{index.root} has {classes}",
            "Evaluate on the classes that the net was trained on",
        )
    for side in sides:
        if side < net.network.image_size:
            raise InputError(
                f"scale {side} is below the net's image size {net.network.image_size}",
                "Give larger --scales",
            )
        if side > _LARGEST_SCALE * net.network.image_size:
            raise InputError(
                f"scale {side} is more than {_LARGEST_SCALE} times the net's image size "
                f"{net.network.image_size}",
                "Give smaller --scales: one such image would not fit into memory",
            )


class CompiledNet:
    """A net and a protocol as one graph, traced once whatever the shapes of the images."""

    def __init__(self, net: EvaluatedNet, protocol: str) -> None:
        self._net, self._protocol = net, protocol
        self._parameters = {n: tf.Variable(a, trainable=False) for n, a in net.parameters.items()}
        side = net.network.image_size if protocol == "center" else None
        #: Log posteriors float32 [N, classes] of images float32 [N, H, W, 3].
        self.scores = tf.function(
            lambda images: self._graph(protocol, tf.cast(images, tf.as_dtype(net.precision))),
            input_signature=[tf.TensorSpec([None, side, side, 3])],
            autograph=False,
        )

    def over(
        self, index: ExampleIndex, side: int, sizes: np.ndarray | None, batch_size: int
    ) -> Scored:
        """One pass over a split at one scale Q = `side`; `sizes` as `image_sizes` gives them."""
        net = self._net
        if self._protocol == "center" or sizes is None:
            return self._over_centre_crops(index, side, batch_size)
        few = batch_size if self._protocol == "dense" else max(1, batch_size // (2 * GRID))
        pixels = batch_size * net.network.image_size**2
        images = WholeImages(index, net.preprocessing, sizes, side, pixels, few)
        return ((ids, self.scores(batch).numpy()) for batch, ids in images)

    def _over_centre_crops(self, index: ExampleIndex, side: int, batch_size: int) -> Scored:
        preprocessing = dataclasses.replace(self._net.preprocessing, scale_min=side, scale_max=side)
        try:
            for batch in EvaluationStream(index, preprocessing, batch_size):
                counted = batch["weights"].numpy() > 0
                scores = self.scores(batch["images"]).numpy()
                yield batch["example_ids"].numpy()[counted], scores[counted]
        except tf.errors.OpError as error:
            raise unreadable(index, error) from error

    def _graph(self, protocol: str, images: tf.Tensor) -> tf.Tensor:
        network = self._net.network
        if protocol == "center":
            return tf.nn.log_softmax(forward(network, self._parameters, images))
        if protocol == "dense":
            return dense_log_posteriors(network, self._parameters, images)
        if protocol == "multicrop":
            return multicrop_log_posteriors(network, self._parameters, images)
        both = [self._graph(one, images) for one in ("dense", "multicrop")]
        return tf.reduce_logsumexp(tf.stack(both), axis=0) - math.log(2)
