"""A process of a stage among its peers: which mode really runs, sums over processes, and stopping on a signal."""

import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from align.errors import BadInput, RunFailed
from align.libraries import keep_freed_memory
from align.processes import SHARD

if TYPE_CHECKING:
    from torch import Tensor

K = TypeVar("K")
T = TypeVar("T")
TERMINATED = 143
INTERRUPTED = 130


class Stopped(Exception):
    """The run was asked to stop and has saved its state; `code` is the exit code (143 or 130)."""

    def __init__(self, code: int):
        super().__init__("stopped by a signal; what was reached is kept, and the same command goes on from there")
        self.code = code


class Worker:
    """This process among its peers: device, rank, sums over processes, and whether to stop."""

    def __init__(self) -> None:
        import torch
        from accelerate import Accelerator
        from accelerate.utils import DistributedType

        use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        from align.models.backoff import forget
        from align.models.gathering import spreading

        forget()
        self.accelerator = Accelerator(cpu=use_cpu or not torch.cuda.is_available())
        self.device: torch.device = self.accelerator.device
        self.rank, self.num_processes = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        # of several, each of which starts processes of its own: as torch's launcher has it
        self.machine = int(os.environ.get("GROUP_RANK") or 0)
        self.num_machines = int(os.environ.get("GROUP_WORLD_SIZE") or 1)
        self.is_first_here = self.accelerator.is_local_main_process
        plain = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
        if self.accelerator.distributed_type not in plain:
            raise BadInput(
                f"accelerate's mode {self.accelerator.distributed_type.value} is not for a base that roles share: "
                "start it by `align run` with `launch: fsdp`, which spreads the base, or `cpu`, `gpu`, `ddp`"
            )
        self._check_mode()
        self._check_precision()
        if self.device.type == "cpu":
            keep_freed_memory()
        spreading.mesh = self._mesh(os.environ[SHARD]) if SHARD in os.environ else None
        self._signal: int | None = None  # None: the system answers it
        self._is_meeting = False

    def _mesh(self, size: str) -> Any:
        """Of this process's group: so many processes that follow each other, as those of a machine do."""
        from torch.distributed.device_mesh import init_device_mesh

        if not size.isdecimal() or int(size) < 2 or self.num_processes % int(size):
            raise BadInput(f"{SHARD}={size} is no number of processes, 2 or more, that {self.num_processes} come to")
        shape = self.num_processes // int(size), int(size)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("copies", "fsdp"))["fsdp"]  # PEFT knows it so

    def _check_mode(self) -> None:
        """Accelerate quietly runs another mode than the one asked for on some machines: then stop."""
        asked = int(os.environ.get("ALIGN_EXPECTED_PROCESSES") or os.environ.get("WORLD_SIZE") or 1)
        if self.num_processes != asked:
            raise BadInput(
                f"{asked} processes were asked for and {self.num_processes} know of each other; check "
                "`launch` or the accelerate config (two CPU processes: distributed_type MULTI_GPU, "
                "use_cpu true)"
            )
        device = os.environ.get("ALIGN_EXPECTED_DEVICE") or self.device.type
        if self.device.type != device:
            raise BadInput(f"the device {device} was asked for and {self.device.type} is used; check `launch`")

    def _check_precision(self) -> None:
        """What accelerate would do to prepared models, which ours are not, is not left undone without a word."""
        state = self.accelerator.state
        compiler = state.dynamo_plugin.backend.value.lower() if state.dynamo_plugin is not None else "no"
        for name, value in (("mixed_precision", self.accelerator.mixed_precision), ("dynamo_backend", compiler)):
            if value != "no":
                raise BadInput(
                    f"accelerate's {name}: {value} is not obeyed: the stages compute as `model.load_in` says; set it "
                    "to no, and `model.load_in: bfloat16`"
                )

    def hold_signals(self) -> None:
        """From here on SIGTERM and SIGINT wait until the stage asks for them, at the end of a step. Before, there is
        nothing to save: the system ends the process at once, whatever library it is in."""
        if self._signal is None:
            self._signal = 0
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note_signal)

    def release_signals(self) -> None:
        """Ends what `hold_signals` began, and the stage where one came meanwhile. All processes call it together."""
        self.stop_if_asked(lambda: None)
        self._signal = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _signal_so_far(self) -> float:
        self.hold_signals()
        return float(self._signal or 0)

    def stop_if_asked(self, save: Callable[[], None]) -> None:
        """At a step boundary: when any process got a signal, calls `save()` on all and raises Stopped."""
        number = int(self.maximum(self._signal_so_far()))
        if number:
            save()
            raise Stopped(TERMINATED if number == signal.SIGTERM else INTERRUPTED)

    def maximum(self, value: float) -> float:
        """The largest `value` of all processes."""
        return self._maxima(value)[0]

    def _maxima(self, *values: float) -> list[float]:
        """The largest of all processes, of each value."""
        if self.num_processes == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return list(tensor.tolist())

    def sum_(self, tensor: "Tensor") -> "Tensor":
        """Sums `tensor` over the processes in place."""
        if self.num_processes > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every process, in order of rank. Pickle between our own processes only."""
        if self.num_processes == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.num_processes
        dist.all_gather_object(found, value)
        return found

    def gather_rows(self, numbers: Sequence[int], count: int, *columns: "Tensor") -> list["Tensor"]:
        """Columns of `count` rows, whole, of which each process gives the rows of its `numbers`, in rising order.

        (own rows,) or (own rows, width) in; (count,) or (count, largest width) out on every process, in the order of
        the numbers, narrower rows with zeros after.
        """
        if self.num_processes == 1:
            return list(columns)
        import torch

        whole = []
        at = torch.tensor(list(numbers), dtype=torch.long, device=self.device)
        for column in columns:  # (own rows,) or (own rows, width)
            widths = map(int, self._maxima(*column.shape[1:])) if column.ndim > 1 else ()
            rows = torch.zeros(count, *widths, dtype=column.dtype, device=self.device)
            own = rows if column.ndim == 1 else rows[:, : column.shape[1]]
            own[at] = column.to(self.device)
            whole.append(self.sum_(rows).to(column.device))
        return whole

    def merged(self, own: dict[K, T]) -> dict[K, T]:
        """The mappings of all processes, none of which has a key of another's, as one."""
        return {key: value for part in self.gather_objects(own) for key, value in part.items()}

    def agreed(self, call: Callable[[], T]) -> T:
        """`call()` on every process; what fails on one (the first, of several) is raised on all, so that none waits
        for what never comes."""
        found: T | None = None
        failure: BadInput | RunFailed | None = None
        try:
            found = call()
        except (BadInput, RunFailed) as error:
            failure = error
        for each in self.gather_objects(failure):
            if each is not None:
                raise each
        return found  # type: ignore[return-value]  # `call` came back

    def agreed_in_turns(self, call: Callable[[], T]) -> T:
        """As `agreed`, of what may pass through bases that are spread: a process may have no rows, or fail."""
        from align.models.gathering import in_turns

        def work() -> T:
            with in_turns():
                return call()

        return self.agreed(work)

    def at_length(self, call: Callable[[], T]) -> T:
        """As `agreed`, of what may take longer than a collective waits: `call` calls `beat` now and then, and all
        processes meet there until each has come back from it."""
        self._is_meeting = self.num_processes > 1

        def work() -> T:
            try:
                return call()
            finally:
                while self._is_meeting and self._maxima(0.0)[0] > 0.0:
                    pass

        try:
            return self.agreed(work)
        finally:
            self._is_meeting = False

    def beat(self) -> None:
        """From within `at_length`, from whatever thread: this process is still at work."""
        from align.models.gathering import spreading

        if self._is_meeting and not spreading.is_in_turns:  # there they meet for each layer
            self._maxima(1.0)

    def by_one(self, call: Callable[[Callable[[], None]], T] | None) -> T | None:
        """`call(beat)` on the one process that has a `call`; the others wait, longer than a collective of theirs would.

        `call` calls `beat` now and then: all processes meet there, so that nothing times out, and a signal to any of
        them ends the work at once (`beat` raises Stopped). What `call` raises is raised on all.
        """
        return self.agreed(lambda: self._wait_for_one() if call is None else self._as_one(call))

    def _as_one(self, call: Callable[[Callable[[], None]], T]) -> T:
        def beat() -> None:
            self._meet(is_at_work=True)

        beat()
        try:
            found = call(beat)
        except (BadInput, RunFailed):
            self._meet(is_at_work=False)
            raise
        self._meet(is_at_work=False)
        return found

    def _wait_for_one(self) -> None:
        while self._meet(is_at_work=False):
            pass

    def _meet(self, *, is_at_work: bool) -> bool:
        """Whether one process is at work. All come here together; any that has got a signal stops all."""
        number, is_any = self._maxima(self._signal_so_far(), float(is_at_work))
        if number:
            raise Stopped(TERMINATED if number == signal.SIGTERM else INTERRUPTED)
        return is_any > 0.0

    def mine(self, count: int) -> range:
        """The positions among `count` that are this process's to compute."""
        return range(self.rank, count, self.num_processes)

    def dealt(self, sizes: Sequence[int]) -> list[int]:
        """The positions among so many pieces of work that are this process's to do, in rising order: dealt by their
        sizes, so that none waits long for the others. The largest first, each to whoever has the least (Graham 1969).
        """
        if self.num_processes == 1:
            return list(range(len(sizes)))
        given, mine = [0] * self.num_processes, []
        for position in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            to = given.index(min(given))
            given[to] += sizes[position]
            if to == self.rank:
                mine.append(position)
        return sorted(mine)

    def wait(self) -> None:
        """Until every process is here."""
        if self.num_processes > 1:
            self.accelerator.wait_for_everyone()
