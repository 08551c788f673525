"""Which devices train, and the process-wide settings that make runs repeatable."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from diagnostics.errors import InputError
from vggrepro.cluster import VARIABLE, Cluster, cluster_of, meet
from vggrepro.config import TrainConfig
from vggrepro.quiet_import import without_lines
from vggrepro.workers import ALONE, ClusterWorkers, Workers

# Devices to take the CPU for, to try several replicas on one machine.
VIRTUAL_CPUS = "VGGREPRO_VIRTUAL_CPUS"
# What libtpu says of a machine without a TPU, several lines and no news.
_NO_TPU = re.compile(
    rb"Failed to find host bounds|WARNING: Logging before|=== Source Location Trace|learning/"
    rb"|E\d{4} .*(unexpected worker hostname|TPU_WORKER_HOSTNAMES)|$"
)
_TPU_PLACES = ("TPU_NAME", "COLAB_TPU_ADDR", "KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS")


@dataclass(frozen=True)
class Engine:
    """What trains a run.

    Attributes:
      strategy: 'cpu' (one device, also a GPU), 'pjrt', 'mirrored', 'multiworker' or 'tpu'.
      description: of the devices of this process.
      device: where everything runs that no replica owns, as tf.device takes it.
      replicas: over all workers; a batch divides over them.
      distribution: of the last three.
    """

    strategy: str
    description: str
    device: str = "/CPU:0"
    replicas: int = 1
    distribution: tf.distribute.Strategy | None = None
    workers: Workers = ALONE

    @property
    def replicas_here(self) -> int:
        """Replicas of this worker."""
        return self.replicas // self.workers.count

    @property
    def compiled_by_xla(self) -> bool:
        return self.strategy == "tpu"

    @property
    def adds_in_order(self) -> bool:
        """Whether gradients are gathered and added in the order of the replicas.

        A ring of CPUs adds in another order at every place, and its result could not be
        replayed on one device; of two numbers there is only one sum.
        """
        return self.strategy == "multiworker" and self.replicas > 2 and _kind() == "CPU"

    def record(self) -> dict[str, Any]:
        """What the manifest keeps of it."""
        return {
            "strategy": self.strategy,
            "workers": self.workers.count,
            "replicas": self.replicas,
            "devices": self.description,
        }


def start(config: TrainConfig) -> Engine:
    """The devices that will train; with several workers, all of them have come.

    Raises:
      InputError: the configuration asks for devices that are not here; a worker did not come.
    """
    strategy = _chosen(config.strategy)
    if strategy == "pjrt":
        # Not op determinism, under which TensorFlow refuses to lower pooling for XLA.
        return jax_engine()
    if strategy == "cpu":
        return Engine(strategy, prepare(config), device_name(config))
    if strategy == "tpu":
        # Not op determinism, under which TensorFlow refuses to lower pooling for XLA.
        return _tpu_engine()
    _repeatable()
    return _mirrored_engine() if strategy == "mirrored" else _multiworker_engine()


def _chosen(strategy: str) -> str:
    """What 'auto' means here: workers, a TPU, several GPUs, or the first device."""
    if strategy != "auto":
        return strategy
    if os.environ.get(VARIABLE):
        return "multiworker"
    if any(os.environ.get(name) for name in _TPU_PLACES) or tf.config.list_physical_devices("TPU"):
        return "tpu"
    return "mirrored" if len(tf.config.list_physical_devices("GPU")) > 1 else "cpu"


def prepare(config: TrainConfig) -> str:
    """Turns on deterministic kernels and names the one device that replays with TensorFlow."""
    if config.strategy != "pjrt":  # whose step may be lowered in this process, see `start`
        _repeatable()
    return f"CPU, {os.cpu_count()} cores" if device_name(config) == "/CPU:0" else _kind()


def device_name(config: TrainConfig) -> str:
    """The tf.device string of `prepare`'s choice."""
    anywhere = config.strategy in ("auto", "mirrored", "multiworker")
    return "/GPU:0" if anywhere and tf.config.list_physical_devices("GPU") else "/CPU:0"


def _repeatable() -> None:
    tf.config.experimental.enable_op_determinism()
    # Replays compile many steps on purpose; TensorFlow would warn of "retracing".
    tf.get_logger().setLevel(logging.ERROR)


def _gpu_name() -> str:
    gpu = tf.config.list_physical_devices("GPU")[0]
    return tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)


def _take_virtual_cpus() -> None:
    """Splits the CPU as the environment says; each part becomes a replica."""
    text = os.environ.get(VIRTUAL_CPUS, "")
    if not text:
        return
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{VIRTUAL_CPUS}={text} is not a number of devices", "As 4")
    cpu = tf.config.list_physical_devices("CPU")[0]
    parts = [tf.config.LogicalDeviceConfiguration() for _ in range(int(text))]
    try:
        tf.config.set_logical_device_configuration(cpu, parts)
    except RuntimeError as error:
        raise InputError(f"{VIRTUAL_CPUS}: TensorFlow runs already ({error})") from error


def _kind() -> str:
    """What a replica of this process runs on."""
    return f"GPU {_gpu_name()}" if tf.config.list_physical_devices("GPU") else "CPU"


def _mirrored_engine() -> Engine:
    _take_virtual_cpus()
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    names = [f"{device.device_type}:{place}" for place, device in enumerate(devices)]
    strategy = tf.distribute.MirroredStrategy(
        names,
        cross_device_ops=_reduction_in_order() if _kind() == "CPU" else None,
    )
    description = f"{_kind()}, {_counted(len(names), 'device')}"
    return Engine("mirrored", description, replicas=len(names), distribution=strategy)


def _reduction_in_order() -> tf.distribute.CrossDeviceOps:
    from vggrepro.replica_evidence import added_in_order

    return tf.distribute.ReductionToOneDevice(accumulation_fn=added_in_order)


def _multiworker_engine() -> Engine:
    cluster = cluster_of(os.environ)
    meet(cluster, _seconds("VGGREPRO_START_SECONDS", 300.0))
    lost_seconds = _seconds("VGGREPRO_LOST_SECONDS", 30.0)
    strategy = _collective_strategy(cluster, lost_seconds)
    here, count = len(strategy.extended.worker_devices), len(cluster.addresses)
    return Engine(
        "multiworker",
        f"{_kind()}, {_counted(here, 'device')} on each of {_counted(count, 'worker')}",
        replicas=strategy.num_replicas_in_sync,
        distribution=strategy,
        workers=ClusterWorkers(cluster, strategy, here, lost_seconds),
    )


def _collective_strategy(cluster: Cluster, lost_seconds: float) -> tf.distribute.Strategy:
    from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
    from tensorflow.python.eager import context

    # What the strategy would configure itself, without an end to its waiting.
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader=cluster.leader,
        cluster_register_timeout_in_ms=60_000,
        heartbeat_timeout_in_ms=round(1000 * lost_seconds),
        shutdown_barrier_timeout_in_ms=5_000,
        coordinated_jobs=[
            coordination_config_pb2.CoordinatedJob(name=job, num_tasks=tasks)
            for job, tasks in cluster.jobs.items()
        ],
    )
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except (tf.errors.OpError, RuntimeError) as error:
        raise InputError(
            f"the workers of {VARIABLE} could not be connected: {_first_line(error)}",
            "Look at what the others say",
        ) from error


def _tpu_engine() -> Engine:
    try:
        # 'local' is the TPU of a Cloud TPU VM.
        name = os.environ.get("TPU_NAME", "local")
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(name)
        strategy = tf.distribute.TPUStrategy(resolver)
    except (ValueError, RuntimeError, OSError, tf.errors.OpError) as error:
        raise InputError(
            f"strategy 'tpu' finds no TPU: {_first_line(error)}",
            "On a machine with one: pip install 'vggrepro[tpu]'; where its runtime is JAX's "
            "(Kaggle, Colab), --strategy pjrt",
        ) from error
    replicas = strategy.num_replicas_in_sync
    return Engine(
        "tpu", f"TPU, {_counted(replicas, 'core')}", replicas=replicas, distribution=strategy
    )


def jax_engine() -> Engine:
    """All devices that JAX sees.

    Raises:
      InputError: JAX is missing or finds no device.
    """
    try:
        import jax
    except ImportError as error:
        raise InputError(
            "--strategy pjrt needs JAX, which is not installed",
            "Install it: pip install 'vggrepro[pjrt]'",
        ) from error
    try:
        with without_lines(_NO_TPU):
            devices = jax.devices()
    except RuntimeError as error:
        raise InputError(f"JAX finds no device: {_first_line(error)}") from error
    text = f"{len(devices)} x {devices[0].device_kind} through JAX {jax.__version__}"
    return Engine("pjrt", text, replicas=len(devices))


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise InputError(f"{variable}={text} is not a number of seconds", f"As {default:g}")
    return seconds


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(". ")
