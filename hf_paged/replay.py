"""Decode steps from CUDA graphs: which graph carries a step out, when one is captured, and when it is given up."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_paged.backends import AttentionBackend
from hf_paged.backends.fixed import FixedStep, UncapturableError
from hf_paged.cache import PagedCache
from hf_paged.capturable import inputs_of, model_obstacle
from hf_paged.captured import CapturedStep
from hf_paged.core.foresight import Foreseen, foresee
from hf_paged.core.forks import new_rlock
from hf_paged.core.plan import StepPlan
from hf_paged.core.table import BlockTable
from hf_paged.forward import ModelCall
from hf_paged.graphs import GraphDriver, driver_for
from hf_paged.identity import ModelIdentity
from hf_paged.stats import Counters

# Each holds its logits, and buffers of some 20 KB; what they compute in lies in one pool for all of them.
MAX_GRAPHS = 32
# More rows keep a GPU busy enough that nobody notices Python.
MAX_ROWS = 256
# Steps that nobody looks ahead from after one that did not come as foreseen: beams part in every step.
PAUSE_STEPS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Ahead:
    """The step that comes next, if the rows stay and grow by a token each.

    Attributes:
        foreseen: its plans.
        step: its numbers.
    """

    foreseen: Foreseen
    step: FixedStep


@dataclass(slots=True, eq=False)
class Standing:
    """How things stand with a cache in one decoding loop.

    Attributes:
        digest: of the model's state; `None` where nothing of it is captured.
        noted: reasons that were counted.
        ahead: what was foreseen of the next step.
        pause_steps: for which nothing is to be foreseen.
    """

    digest: bytes | None
    noted: set[str] = field(default_factory=set)
    ahead: Ahead | None = None
    pause_steps: int = 0


class DecodeGraphs:
    """The graphs of one patched model. Several threads may ask; steps are carried out one at a time.

    A graph belongs to the state that the model was in (weights and where they lie, adapters, config), a pool, a number
    of rows (a power of two; some may stand for none), and rooms for the numbers of a step, which grow with the
    sequences: every doubling of these is another graph. Those least recently used go first, and all of them with
    `clear`, or when the model is in a state that none of them was captured in, adapters aside.

    Args:
        model: held weakly.
        enabled: the setting `cuda_graphs`.
        counters: told what a step was, and why it was not a graph's where that may come as a surprise.
    """

    def __init__(self, model: PreTrainedModel, enabled: bool, counters: Counters):
        self._model = weakref.ref(model)
        self._enabled = enabled
        self._counters = counters
        self._identity = ModelIdentity(model)
        self._epoch: bytes | None = None
        self._lock = new_rlock()
        self._drivers: dict[torch.device, GraphDriver | None] = {}
        self._asked: dict[bytes, Sequence[Sequence[Any]]] = {}
        self._steps: OrderedDict[tuple[Any, ...], CapturedStep | str] = OrderedDict()  # or why there is none

    def __len__(self) -> int:
        return sum(isinstance(each, CapturedStep) for each in self._steps.values())

    def passing(self) -> AbstractContextManager[None]:
        """Around every pass of the model; see `ModelIdentity.passing`."""
        return self._identity.passing()

    def clear(self) -> None:
        """Give every graph up, and their memory."""
        with self._lock:
            for driver in self._drivers.values():
                if driver is not None:
                    driver.release()
            self._steps.clear()
            self._asked.clear()

    def step(
        self,
        request: ModelCall,
        cache: PagedCache,
        backend: AttentionBackend,
        plans: Sequence[StepPlan],
        active: Sequence[int],
        tables: Sequence[BlockTable],
    ) -> Any | None:
        """The outputs of a decode step, or `None` where the model is to be called as ever.

        Args:
            request: the call.
            cache: its cache, of the length before the step.
            backend: of the step.
            plans: of the step, by group.
            active: the rows of the call that the plans' queries belong to.
            tables: of these rows.
        """
        may_be_fixed = backend.has_fixed_steps or backend.obstacle_to_graphs is not None
        if not self._enabled or not may_be_fixed or torch.is_grad_enabled() or cache.dense_len < 2:
            return None
        driver = self._driver(request.inputs.device)
        if driver is None:
            return None
        with self._lock:
            standing = self._standing(cache, request.inputs.device)
            if backend.obstacle_to_graphs is not None:
                self._note(standing, backend.obstacle_to_graphs)
                return None
            asked = self._asked.get(standing.digest)
            if asked is None:
                return None
            try:
                outputs = self._replay(driver, standing, asked, request, cache, backend, plans, active, tables)
            except UncapturableError as error:
                self._note(standing, str(error))
                return None
        self._counters.add(replayed_steps=1)
        return outputs

    def foreseen(self, cache: PagedCache) -> Foreseen | None:
        """The plans of the cache's next step, if it comes as was to be expected."""
        ahead = None if cache.standing is None else cache.standing.ahead
        return None if ahead is None else ahead.foreseen

    def learn(self, cache: PagedCache, backend: AttentionBackend, plans: Sequence[StepPlan]) -> None:
        """Note what attention has asked of the plans of a step that was no graph."""
        standing = cache.standing if backend.has_fixed_steps else None
        if standing is not None and standing.digest is not None:
            with self._lock:
                self._asked[standing.digest] = [sorted(plan.prepared.get("asked", ()), key=repr) for plan in plans]

    def _driver(self, device: torch.device) -> GraphDriver | None:
        if device not in self._drivers:
            self._drivers.setdefault(device, driver_for(device))
        return self._drivers[device]

    def _standing(self, cache: PagedCache, device: torch.device) -> Standing:
        """Found once a loop of `generate`; a caller of their own may do anything between two steps."""
        if cache.standing is None or not cache.generating:
            cache.standing = self._look(device)
        return cache.standing

    def _look(self, device: torch.device) -> Standing:
        digest, obstacle = self._identity.glance()
        obstacle = obstacle or model_obstacle(self._model(), device)
        if obstacle is not None:
            standing = Standing(None)
            self._note(standing, obstacle)
            return standing
        if self._epoch != self._identity.epoch:
            self._epoch = self._identity.epoch
            self.clear()
        return Standing(digest)

    def _note(self, standing: Standing, reason: str) -> None:
        if reason not in standing.noted:
            standing.noted.add(reason)
            self._counters.fall_back(f"no CUDA graphs: {reason}")

    def _replay(
        self,
        driver: GraphDriver,
        standing: Standing,
        asked: Sequence[Sequence[Any]],
        request: ModelCall,
        cache: PagedCache,
        backend: AttentionBackend,
        plans: Sequence[StepPlan],
        active: Sequence[int],
        tables: Sequence[BlockTable],
    ) -> Any:
        """Raises `UncapturableError`."""
        device, rows = request.inputs.device, _bucket(len(active))
        tensors, constants = inputs_of(request)
        step = _as_foreseen(standing, plans, active, asked) or FixedStep.of(plans, asked, active, rows, device)
        shapes = tuple(sorted((name, value.dtype, tuple(value.shape[:-2])) for name, value in tensors.items()))
        values = tuple(sorted(constants.items()))
        signature = (standing.digest, backend.name, device, shapes, values, step.rooms)
        with driver.turn():
            if any(plan.copies for plan in plans):
                for layer, group in enumerate(cache.pool.layer_groups):
                    backend.copy(cache.pool.stores[layer], plans[group])
            captured = self._steps.get(signature)
            if isinstance(captured, CapturedStep) and captured.belongs_to(cache):
                captured.replay(tensors, step)
            elif not isinstance(captured, str):
                try:
                    captured = CapturedStep(driver, request, tensors, constants, cache, backend, step, rows)
                except Exception as error:  # whatever the model or the device does not like
                    captured = str(error) if isinstance(error, UncapturableError) else _described(error)
                self._keep(signature, captured)
            self._steps.move_to_end(signature)
            if isinstance(captured, str):
                raise UncapturableError(captured)
            outputs = captured.outputs(request, len(active))
            self._look_ahead(standing, cache, captured, step, tables)
            return outputs

    @staticmethod
    def _look_ahead(
        standing: Standing,
        cache: PagedCache,
        captured: CapturedStep,
        step: FixedStep,
        tables: Sequence[BlockTable],
    ) -> None:
        """Plan the next step, and send its numbers, while the device computes this one."""
        if standing.pause_steps or not cache.generating:
            standing.pause_steps = max(0, standing.pause_steps - 1)
            return
        foreseen = foresee(cache.pool.manager, tables)
        if foreseen is not None:
            following = step.next(foreseen.plans)
            if following.rooms == step.rooms:
                captured.send(following)
            standing.ahead = Ahead(foreseen, following)

    def _keep(self, signature: tuple[Any, ...], captured: CapturedStep | str) -> None:
        self._steps[signature] = captured
        while len(self._steps) > MAX_GRAPHS:
            self._steps.popitem(last=False)


def _as_foreseen(
    standing: Standing, plans: Sequence[StepPlan], active: Sequence[int], asked: Sequence[Sequence[Any]]
) -> FixedStep | None:
    """The numbers of a step that were laid out ahead, if it is the one; they serve once."""
    ahead, standing.ahead = standing.ahead, None
    if ahead is None:
        return None
    if plans is not ahead.foreseen.plans or not ahead.step.serves(active, asked):
        standing.pause_steps = PAUSE_STEPS
        return None
    return ahead.step


def _bucket(rows: int) -> int:
    """Rows of the pass that carries out a step of `rows` rows."""
    if rows > MAX_ROWS:
        raise UncapturableError(f"more than {MAX_ROWS} rows")
    return 1 << (rows - 1).bit_length()


def _described(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"a capture has failed: {type(error).__name__}: {lines[0]}"
