"""What a test needs beyond this package, as marks that skip it, with the reason, where it is missing."""

from __future__ import annotations

import pytest

from cutlass_fa.disassembly import find_nvdisasm
from cutlass_fa.errors import FlashAttnError
from cutlass_fa.toolchain import find_toolchain


def _missing_compiler() -> str:
    try:
        find_toolchain()
    except FlashAttnError as error:
        return str(error)
    return ""


def _missing_disassembler() -> str:
    try:
        find_nvdisasm()
    except FlashAttnError as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(_missing_compiler()), reason=_missing_compiler())
needs_nvdisasm = pytest.mark.skipif(bool(_missing_disassembler()), reason=_missing_disassembler())
