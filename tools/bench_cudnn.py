"""cuDNN's forward on 8-bit numbers, which PyTorch does not call, through its own front end (nvidia-cudnn-frontend)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from tools.bench_inputs import Inputs

_FACTORS = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")  # of sdpa_fp8, all 1 here


def fp8_call(torch: Any, inputs: Inputs) -> Callable[[], Any]:
    """A call that returns out, (batch, seqlen_q, num_heads_q, head_dim) in q's type. Raises NotImplementedError for features that it is not
    asked for here, and RuntimeError where the front end is not installed or has no plan."""
    inputs.check_features()
    try:
        cudnn = importlib.import_module("cudnn")
    except ImportError as error:
        raise RuntimeError("nvidia-cudnn-frontend is not installed") from error
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))  # (batch, heads, seqlen, head_dim), the same memory
    out = torch.empty_like(inputs.q)
    ones = {name: torch.ones((1, 1, 1, 1), device="cuda") for name in _FACTORS}
    handle = cudnn.create_handle()
    cudnn.set_stream(handle, torch.cuda.current_stream().cuda_stream)
    types = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=_type_of(cudnn, out), intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT, handle=handle
    )
    tensors = {name: graph.tensor(dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=types.FLOAT, name=name) for name in _FACTORS}
    named = {
        name: graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=_type_of(cudnn, x), name=name)
        for name, x in (("q", q), ("k", k), ("v", v))
    }
    results = graph.sdpa_fp8(**named, **tensors, is_inference=True, attn_scale=q.shape[-1] ** -0.5, use_causal_mask=inputs.causal)
    o, amax_s, amax_o = results[0], results[2], results[3]
    view = out.transpose(1, 2)
    o.set_output(True).set_dim(list(view.shape)).set_stride(list(view.stride())).set_data_type(_type_of(cudnn, out))
    largest = {}
    for tensor in (amax_s, amax_o):
        tensor.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(types.FLOAT)
        largest[tensor] = torch.zeros((1, 1, 1, 1), device="cuda")
    graph.build([cudnn.heur_mode.A])
    workspace = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device="cuda")
    pack = {named["q"]: q, named["k"]: k, named["v"]: v, o: view, **{tensors[name]: ones[name] for name in _FACTORS}, **largest}

    def call() -> Any:
        graph.execute(pack, workspace, handle=handle)
        return out

    return call


def _type_of(cudnn: Any, x: Any) -> Any:
    return cudnn.data_type.FP8_E4M3 if "e4m3" in str(x.dtype) else cudnn.data_type.FP8_E5M2
