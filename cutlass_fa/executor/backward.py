"""The backward on the CPU executor: NumPy arrays in, what its three or more kernels wrote out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import library_of
from ..cell import Cell
from ..cells.fa2_bwd import Fa2BwdCell
from ..dispatch import DispatchKey
from ..extras import EXTRA_NAMES, ExtraSpecs
from ..launches.fa2_bwd import Workspace, launches_of
from ..problem_backward import BackwardProblem
from ..render import render
from ..request_parts import Window
from .build import ExecutorKernel, Program
from .faults import ExecutorError
from .launch import DEFAULT_TIME_LIMIT_S, GlobalMemory, launch
from .outputs import POISON_BYTE, Output, check_written, span


@dataclass(frozen=True)
class Backward:
    """dq, dk, dv in the shapes and the dtype of q, k and v; dlearnable_sink float32 (num_heads_q,), None without learnable_sink."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dlearnable_sink: np.ndarray | None = None


def build_program(key: DispatchKey) -> Program:
    """The program of a cell, compiled or found compiled."""
    return ExecutorKernel.build(render(Cell.of(key)))


def run_backward(
    key: DispatchKey,
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    *,
    seed: int,
    build: Callable[[DispatchKey], Program] = build_program,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    random_state: tuple[int, int] = (0, 0),
    window_size: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    q_offset: int | None = None,
    k_offset: int | None = None,
    dlse: np.ndarray | None = None,
    gradients_like: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None] = (None, None, None),
    num_splits: int = 1,
    num_copies: int = 1,
    time_limit_s: int = DEFAULT_TIME_LIMIT_S,
    **extras: np.ndarray | None,
) -> Backward:
    """Run a whole backward call whose main kernel is `key`'s on the CPU, with learnable_sink or without.

    dout, q, k, v, out, lse, dlse: as flash_attn_backward takes them, or flash_attn_varlen_backward where the key is of packed sequences, in
    the key's dtype and any strides that a GPU's call accepts.
    seed: the schedule of every launch. build: where programs come from. softcap, dropout_p: positive where the key has them, else 0.
    window_size, sink_tokens, q_offset, k_offset and extras (those of ExtraSpecs): as the forward had them, where the key has them.
    gradients_like: arrays whose shapes and strides dq, dk and dv have; default contiguous. num_splits, num_copies: as Fa2BwdRequest has,
    several splits where the key has them.

    Raises ExecutorFault where a kernel misbehaves (also when it writes around a strided output or leaves some of an output unwritten),
    ExecutorError where the call needs another main kernel than `key`, HostCompileError, and what BackwardProblem.from_specs raises.
    """
    spec: Any = library_of(np.ndarray).spec
    dq_like, dk_like, dv_like = (None if like is None else spec(like) for like in gradients_like)
    problem = BackwardProblem.from_specs(
        spec(dout),
        spec(q),
        spec(k),
        spec(v),
        spec(out),
        spec(lse),
        None if dlse is None else spec(dlse),
        (dq_like, dk_like, dv_like),
        recompute=False,
        arch=key.arch,
        mask=Window(*window_size, causal=key.causal),
        sink_tokens=sink_tokens,
        q_offset=q_offset,
        k_offset=k_offset,
        extras=ExtraSpecs.of(library_of(np.ndarray), [extras.get(name) for name in EXTRA_NAMES]),
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=key.deterministic,
        num_splits=num_splits,
        num_copies=num_copies,
    )
    if problem.request.dispatch_key() != key:
        raise ExecutorError(f"the call needs {problem.request.dispatch_key()}, not {key}")
    memory = GlobalMemory()
    inputs = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse}
    inputs |= {name: array for name, array in {"dlse": dlse, **extras}.items() if array is not None}
    addresses = dict.fromkeys(("dlse", *EXTRA_NAMES), 0) | {name: memory.add(name, span(array)).address for name, array in inputs.items()}
    outputs = {name: Output.add(memory, getattr(problem, name), name) for name in ("dq", "dk", "dv")}
    addresses |= {name: output.buffer.address for name, output in outputs.items()}
    sink_gradient = memory.add("dlearnable_sink", np.full(4 * q.shape[-2], POISON_BYTE, np.uint8), writable=True)
    addresses["dlearnable_sink"] = sink_gradient.address
    cells = {each: Cell.of(each) for each in problem.request.dispatch_keys()}
    main = cells[key]
    assert isinstance(main, Fa2BwdCell)
    workspace = Workspace.of(problem, main)
    start = memory.add("workspace", np.full(4 * workspace.floats, POISON_BYTE, np.uint8), writable=True).address
    addresses |= {name: start + place for name, place in workspace.places.items()}
    for each in launches_of(problem, cells):
        for name, field in zip(each.addresses, cells[each.key].params, strict=False):
            each.params[field.name] = addresses[name]
        if cells[each.key].has_dropout:
            each.params["dropout_seed"], each.params["dropout_offset"] = random_state
        launch(build(each.key), each.grid, [each.params.tobytes()], memory, seed=seed, time_limit_s=time_limit_s)
    run, results = f"{key}, seed {seed}", {}
    for name, output in outputs.items():
        bits = output.values(run)
        check_written(run, name, bits)
        results[name] = bits.view(q.dtype).reshape(problem.shape_of(output.spec))
    if problem.dlearnable_sink is not None:
        check_written(run, "dlearnable_sink", sink_gradient.data.view(np.uint32))
        results["dlearnable_sink"] = sink_gradient.data.view(np.float32)
    return Backward(**results)
