"""The processes that train one run together: what they tell each other besides gradients."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context as tensorflow_context

from diagnostics.errors import InputError, StoppedByGuard, WorkerLost
from vggrepro.cluster import Cluster

_TASK = re.compile(r"/job:(\w+)/(?:replica:\d+/)?task:(\d+)")
_ABORTED = tf.errors.ABORTED  # as which one's failure reaches the others
# What a collective operation raises whose peer has gone.
LOST_ERRORS = (
    *(tf.errors.AbortedError, tf.errors.UnavailableError),
    *(tf.errors.CancelledError, tf.errors.DeadlineExceededError),
)
_OUR_OWN = "vggrepro said: "


class Workers:
    """The only process of a run.

    Attributes:
      index: of this process; 0 is the chief, which alone writes the run directory.
    """

    index, count = 0, 1

    @property
    def is_chief(self) -> bool:
        return self.index == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any worker; all of them must ask."""
        return flag

    def gather(self, array: np.ndarray) -> np.ndarray:
        """[count, ...]: the array of every worker, of one shape; all of them must ask."""
        return array[np.newaxis]

    def part(self) -> None:
        """Before this one ends on purpose: waits until nobody needs anything of it any more."""

    def must_agree(self, what: str, text: str) -> None:
        """Compares a text over the workers; all of them must ask.

        Raises:
          InputError: not all workers have the same text; names those unlike the chief.
        """
        digest = hashlib.sha256(text.encode()).digest()
        texts = self.gather(np.frombuffer(digest, np.int32))
        unlike = [str(worker) for worker in range(self.count) if (texts[worker] != texts[0]).any()]
        if unlike:
            raise InputError(
                f"worker {', '.join(unlike)} has another {what} than the chief",
                "Start all with the same options and the same data",
            )

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Around all that the workers do with each other: one's failure ends the others too."""
        return contextlib.nullcontext()


ALONE = Workers()


class ClusterWorkers(Workers):
    """One of several, over TensorFlow's collective operations.

    Args:
      replicas_here: of this worker; as many as of every other.
      lost_seconds: after how long without a sign a worker counts as lost.
    """

    def __init__(
        self,
        cluster: Cluster,
        strategy: tf.distribute.Strategy,
        replicas_here: int,
        lost_seconds: float,
    ) -> None:
        self.index, self.count = cluster.index, len(cluster.addresses)
        self._cluster, self._strategy = cluster, strategy
        self._replicas_here, self._lost_seconds = replicas_here, lost_seconds
        self._gather = tf.function(self._gathered, autograph=False)

    def any(self, flag: bool) -> bool:
        return bool(self.gather(np.array(flag, np.int32)).any())

    def gather(self, array: np.ndarray) -> np.ndarray:
        return self._gather(tf.constant(array)).numpy()[:: self._replicas_here]

    def part(self) -> None:
        self.any(False)
        # Who has come through this one knows that all came through the first.
        with contextlib.suppress(tf.errors.OpError):
            self.any(False)

    def _gathered(self, array: tf.Tensor) -> tf.Tensor:
        def here() -> tf.Tensor:
            with tf.device("/CPU:0"):
                mine = tf.identity(array[tf.newaxis])
            return tf.distribute.get_replica_context().all_gather(mine, axis=0)

        return self._strategy.experimental_local_results(self._strategy.run(here))[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """As `Workers.together`.

        Raises:
          WorkerLost: another worker failed, ended or is not heard of any more.
        """
        try:
            yield
        except StoppedByGuard:
            raise  # on all of them at once
        except tf.errors.OpError as error:
            if isinstance(error, LOST_ERRORS):
                raise self._lost(str(error)) from error
            self._tell(error)
            raise
        except BaseException as error:
            self._tell(error)
            raise

    def _tell(self, error: BaseException) -> None:
        """Ends the others' waiting, with the reason."""
        said = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        with contextlib.suppress(tf.errors.OpError):  # they may have gone already
            tensorflow_context.context().report_error_to_cluster(_ABORTED, _OUR_OWN + said)

    def _lost(self, text: str) -> WorkerLost:
        """What an operation's end without a result means."""
        places = [self._cluster.worker_of(job, int(task)) for job, task in _TASK.findall(text)]
        others = [worker for worker in places if worker != self.index]
        who = f"worker {others[0]} ({self._cluster.addresses[others[0]]})" if others else "a worker"
        reason = f"{who} is gone, or was not heard of for {self._lost_seconds:g} s"
        if _OUR_OWN in text:
            told = text.partition(_OUR_OWN)[2].splitlines()[0]
            reason = f"{who} has failed: {told}"
        return WorkerLost(
            f"{reason}; this one, worker {self.index}, stops as well",
            "Go on from the last checkpoint with train --resume, with any number of workers",
        )
