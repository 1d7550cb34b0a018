"""Layout algebra of the generator: where a tile lies in shared memory, and which thread holds which element.

Hopper kernels read shared memory through 64-bit matrix descriptors and keep operands in registers in an order
that the hardware fixes. The generator computes both here, once, and prints them into the kernel as named
constants, so that no C++ template has to compute them at each compile.

Sources: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" (register fragments of wgmma m64nNk16,
shared memory matrix layouts, strides, matrix descriptor format) and, for the swizzle, "Tensors: swizzling
modes". CuTe's own layouts (GMMA::Layout_{K,MN}_SW{32,64,128}_Atom, make_gmma_desc, CLayout_64xN,
ALayout_64x16), compiled on the host, are the check in tests/test_layouts.py.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP_THREADS = 32
WARPGROUP_THREADS = 128
WGMMA_M = 64
WGMMA_K_BYTES = 32  # one wgmma reads 32 bytes of each row along K: 16 elements of 16 bits, 32 of 8
WGMMA_K = 16  # for 16-bit elements
WGMMA_MAX_N = 256

_SWIZZLE_UNIT_BYTES = 16
_SWIZZLE_ROWS = 8  # the swizzle repeats every 8 * swizzle_bytes bytes: 8 rows at a pitch of swizzle_bytes
_TMA_MAX_BOX = 256  # elements along each dimension of a TMA box
_ADDRESS_MASK = 0x3FFFF
_LAYOUT_TYPES = {128: 1, 64: 2, 32: 3, 0: 0}  # by the bytes of the swizzle
_SWIZZLES = (32, 64, 128)


def _check_index(name: str, value: int, stop: int) -> None:
    if not 0 <= value < stop:
        raise ValueError(f"{name} must be in [0, {stop}), not {value}")


@dataclass(frozen=True)
class MatrixDescriptor:
    """The fields of a wgmma matrix descriptor that do not depend on where the matrix starts.

    Attributes:
        leading_byte_offset: multiple of 16, in [0, 2**18). K-major: ignored by the hardware where the layout is swizzled. MN-major:
            bytes from one chunk of swizzle_bytes along M or N to the next. Without swizzle: bytes from 8 elements of K to the next 8.
        stride_byte_offset: multiple of 16, in [0, 2**18). K-major: bytes from 8 rows of M or N to the next 8.
            MN-major: bytes from 8 rows of K to the next 8; without swizzle as K-major.
        swizzle_bytes: 32, 64 or 128, or 0: none.

    The base offset field is zero, so the tile must start at a multiple of SwizzledTile.alignment.
    Raises ValueError for a field that the format cannot hold.
    Source: PTX ISA, wgmma, "Matrix descriptor format".
    """

    leading_byte_offset: int
    stride_byte_offset: int
    swizzle_bytes: int

    def __post_init__(self) -> None:
        if self.swizzle_bytes not in _LAYOUT_TYPES:
            raise ValueError(f"swizzle_bytes must be 0, 32, 64 or 128, not {self.swizzle_bytes}")
        for name in ("leading_byte_offset", "stride_byte_offset"):
            value = getattr(self, name)
            if value % 16 or not 0 <= value <= _ADDRESS_MASK:
                raise ValueError(f"{name} must be a multiple of 16 in [0, 2**18), not {value}")

    @property
    def bits(self) -> int:
        """The 64-bit descriptor with a start address of zero."""
        leading, stride = self.leading_byte_offset >> 4, self.stride_byte_offset >> 4
        return leading << 16 | stride << 32 | _LAYOUT_TYPES[self.swizzle_bytes] << 62

    def at(self, address: int) -> int:
        """The 64-bit descriptor of a matrix that starts at shared-memory byte `address`, a multiple of 16."""
        if address % 16 or address < 0:
            raise ValueError(f"address must be a non-negative multiple of 16, not {address}")
        return self.bits | (address & _ADDRESS_MASK) >> 4


@dataclass(frozen=True)
class SwizzledTile:
    """A (rows, cols) tile of a row-major global matrix as swizzled TMA loads place it in shared memory.

    The tile is cut along its columns into chunks of swizzle_bytes, one TMA box of (rows, chunk_cols) each,
    written with CU_TENSOR_MAP_SWIZZLE_{32,64,128}B. Chunk c occupies chunk_bytes bytes at c * chunk_bytes;
    its rows lie at a pitch of swizzle_bytes, and the 16-byte units of a row are permuted by XOR with bits of
    the row.

    Attributes:
        rows: a multiple of 8 in [8, 256] (a TMA box holds at most 256 rows).
        cols: positive; a row must be a multiple of 16 bytes. The last chunk may be partly used, as by
            head_dim 80 in chunks of 32 columns; its box fills the rest with the next columns, zeros outside
            the tensor.
        swizzle_bytes: 32, 64 or 128.
        element_bytes: 1, 2 or 4; default 2.

    Raises ValueError for anything else.
    """

    rows: int
    cols: int
    swizzle_bytes: int
    element_bytes: int = 2

    def __post_init__(self) -> None:
        if self.swizzle_bytes not in _SWIZZLES:
            raise ValueError(f"swizzle_bytes must be 32, 64 or 128, not {self.swizzle_bytes}")
        if self.element_bytes not in (1, 2, 4):
            raise ValueError(f"element_bytes must be 1, 2 or 4, not {self.element_bytes}")
        if self.rows % _SWIZZLE_ROWS or not 0 < self.rows <= _TMA_MAX_BOX:
            raise ValueError(f"rows must be a multiple of 8 in [8, {_TMA_MAX_BOX}], not {self.rows}")
        if self.cols <= 0 or self.cols * self.element_bytes % _SWIZZLE_UNIT_BYTES:
            raise ValueError(f"cols must be positive and fill 16-byte units, not {self.cols}")

    @property
    def chunk_cols(self) -> int:
        """Columns of one chunk, the width of a TMA box."""
        return self.swizzle_bytes // self.element_bytes

    @property
    def num_chunks(self) -> int:
        """Chunks, the number of TMA boxes."""
        return -(-self.cols // self.chunk_cols)

    @property
    def padded_cols(self) -> int:
        """Columns that have a place: cols rounded up to whole chunks."""
        return self.num_chunks * self.chunk_cols

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk, and from one chunk to the next."""
        return self.rows * self.swizzle_bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of the tile, a multiple of `alignment`, so that the stages of a pipeline can adjoin."""
        return self.num_chunks * self.chunk_bytes

    @property
    def alignment(self) -> int:
        """Bytes to which the tile must be aligned: one period of the swizzle, 1024, 512 or 256."""
        return _SWIZZLE_ROWS * self.swizzle_bytes

    def byte_offset(self, row: int, col: int) -> int:
        """Byte offset of element (row, col) from the start of the tile; col may reach into the padding.

        Address bits 4 and up (the 16-byte unit of a row) are XORed with bits 7 and up (the row, or the row
        divided by 4 or 2 where the pitch is 32 or 64 bytes): 1, 2 or 3 bits for 32, 64 or 128 bytes. A chunk
        is a multiple of the swizzle's period, so its own offset changes none of them. Raises ValueError
        outside the tile.
        """
        _check_index("row", row, self.rows)
        _check_index("col", col, self.padded_cols)
        chunk, chunk_col = divmod(col, self.chunk_cols)
        linear = chunk * self.chunk_bytes + row * self.swizzle_bytes + chunk_col * self.element_bytes
        return linear ^ (linear >> 3 & self.swizzle_bytes - _SWIZZLE_UNIT_BYTES)

    def ldmatrix_offset(self, operand: str, lane: int, row: int, col: int) -> int:
        """Byte offset of the 16 bytes that `lane` names to a four-matrix ldmatrix of the 16 x 16 block at (row, col), multiples of 16.

        operand: as in ldmatrix_coordinates. A kernel computes it as the lane's offset in the block at (0, 0), with the block's place
        among the chunk's columns XORed in and its row and chunk added. Raises ValueError outside the tile.
        """
        block_row, block_col = ldmatrix_coordinates(operand, lane)
        return self.byte_offset(row + block_row, col + block_col)

    @property
    def num_k_major_steps(self) -> int:
        """wgmma instructions that cover cols as K. Raises ValueError if a row is no multiple of 32 bytes."""
        if self.cols * self.element_bytes % WGMMA_K_BYTES:
            raise ValueError(f"a K-major row must be a multiple of 32 bytes, not {self.cols} columns")
        return self.cols * self.element_bytes // WGMMA_K_BYTES

    @property
    def num_mn_major_steps(self) -> int:
        """wgmma instructions that cover the rows as K. Raises ValueError as mn_major_descriptor does."""
        self._check_mn_major()
        return self.rows // WGMMA_K

    def k_major_descriptor(self) -> MatrixDescriptor:
        """Descriptor of the tile as an operand whose K dimension is its columns, M or N its rows (Q and K).

        An operand from row r on, r a multiple of 8 (a warpgroup's 64 rows of Q), starts byte_offset(r, 0) on.
        """
        # A swizzled K-major descriptor has no use for the leading offset; 16 bytes is what CuTe puts there.
        return MatrixDescriptor(_SWIZZLE_UNIT_BYTES, self.alignment, self.swizzle_bytes)

    def mn_major_descriptor(self) -> MatrixDescriptor:
        """Descriptor of the tile as an operand whose K dimension is its rows, M or N its columns (V).

        Raises ValueError if rows is no multiple of 16 or the elements are not of 16 bits, the only ones that
        wgmma reads MN-major.
        """
        self._check_mn_major()
        return MatrixDescriptor(self.chunk_bytes, self.alignment, self.swizzle_bytes)

    def k_major_step_bytes(self, step: int) -> int:
        """Bytes from the start address to the step-th 32 bytes of columns (16 columns of 16-bit elements).

        Within a chunk the steps are 32 bytes apart: the hardware swizzles the addresses that it computes from
        the start, so the start is given unswizzled. Raises ValueError outside num_k_major_steps.
        """
        _check_index("step", step, self.num_k_major_steps)
        chunk, chunk_step = divmod(step, self.swizzle_bytes // WGMMA_K_BYTES)
        return chunk * self.chunk_bytes + chunk_step * WGMMA_K_BYTES

    def mn_major_step_bytes(self, step: int) -> int:
        """Bytes from the start address to the step-th 16 rows; ValueError outside num_mn_major_steps."""
        _check_index("step", step, self.num_mn_major_steps)
        return step * WGMMA_K * self.swizzle_bytes

    def _check_mn_major(self) -> None:
        if self.element_bytes != 2:
            raise ValueError(f"an MN-major operand needs 16-bit elements, not {8 * self.element_bytes}-bit")
        if self.rows % WGMMA_K:
            raise ValueError(f"an MN-major operand needs a multiple of {WGMMA_K} rows, not {self.rows}")


@dataclass(frozen=True)
class KeyGroupTile:
    """A (keys, cols) tile of 16-bit elements whose global matrix has the same column of neighbouring keys together, not a key's columns.

    Groups of 8 keys, one TMA box of (cols, 8 keys) each and without swizzle, lie one after the other: in a group, every column has 16
    bytes, its 8 keys, and columns follow each other. wgmma reads that as an operand without swizzle, whose 8 x 8 blocks are then 128
    bytes in one piece, whichever of its sides is summed over. A box of 8 keys fits every page of a cache.

    keys: a multiple of 16. cols: a multiple of 16, at most 256 (a TMA box). Raises ValueError for anything else.
    """

    keys: int
    cols: int

    def __post_init__(self) -> None:
        if self.keys <= 0 or self.keys % WGMMA_K:
            raise ValueError(f"keys must be a positive multiple of {WGMMA_K}, not {self.keys}")
        if self.cols % WGMMA_K or not 0 < self.cols <= _TMA_MAX_BOX:
            raise ValueError(f"cols must be a multiple of {WGMMA_K} in [{WGMMA_K}, {_TMA_MAX_BOX}], not {self.cols}")

    @property
    def group_bytes(self) -> int:
        """Of 8 keys, and from one group to the next."""
        return self.cols * _SWIZZLE_UNIT_BYTES

    @property
    def size_bytes(self) -> int:
        return self.keys // 8 * self.group_bytes

    def byte_offset(self, key: int, col: int) -> int:
        """Of element (key, col) from the start of the tile. Raises ValueError outside it."""
        _check_index("key", key, self.keys)
        _check_index("col", col, self.cols)
        return key // 8 * self.group_bytes + col * _SWIZZLE_UNIT_BYTES + key % 8 * 2

    def mn_major_descriptor(self) -> MatrixDescriptor:
        """Descriptor of the tile as an operand whose K dimension is its columns, N its keys (K in Q K^T)."""
        return MatrixDescriptor(8 * _SWIZZLE_UNIT_BYTES, self.group_bytes, 0)

    def k_major_descriptor(self) -> MatrixDescriptor:
        """Descriptor of the tile as an operand whose K dimension is its keys, N its columns (V in P V)."""
        return MatrixDescriptor(self.group_bytes, 8 * _SWIZZLE_UNIT_BYTES, 0)

    @property
    def column_step_bytes(self) -> int:
        """From one 16 columns, a wgmma's share of K as columns, to the next."""
        return WGMMA_K * _SWIZZLE_UNIT_BYTES

    @property
    def key_step_bytes(self) -> int:
        """From one 16 keys, a wgmma's share of K as keys, to the next."""
        return WGMMA_K // 8 * self.group_bytes


def _fragment_coordinates(thread: int, value: int) -> tuple[int, int]:
    """(row, col) of a thread's value in a fragment of 64 rows.

    Warp w holds rows 16 w to 16 w + 15 in 8 x 8 blocks; lane l holds two neighbouring columns of a block,
    from 2 (l % 4) on, in row l // 4. Values go by column, then by block: 8 rows down, then 8 columns on.
    """
    _check_index("thread", thread, WARPGROUP_THREADS)
    warp, lane = divmod(thread, 32)
    block, low = divmod(value, 4)
    return 16 * warp + lane // 4 + 8 * (low // 2), 8 * block + 2 * (lane % 4) + low % 2


def accumulator_coordinates(thread: int, register: int) -> tuple[int, int]:
    """(row, col) of the 64 x N accumulator element in `register` (0 .. N / 2 - 1) of `thread` (0 .. 127).

    Threads are counted within the warpgroup. Each holds 2 rows x N / 4 columns, in the same order for every
    N. Raises ValueError outside the largest N, 256.
    Source: PTX ISA, wgmma.mma_async m64nNk16, "Accumulator D"; CuTe's CLayout_64xN.
    """
    _check_index("register", register, WGMMA_M * WGMMA_MAX_N // WARPGROUP_THREADS)
    return _fragment_coordinates(thread, register)


def a_operand_coordinates(thread: int, register: int, half: int) -> tuple[int, int]:
    """(row, k) of the 64 x 16 A operand element in `half` of `register` (0 .. 3) of `thread` (0 .. 127).

    Registers have 32 bits; half is 0 for the low 16, 1 for the high. Raises ValueError outside these ranges.
    Source: PTX ISA, wgmma.mma_async m64nNk16, "Matrix A" in registers; CuTe's ALayout_64x16.
    """
    _check_index("register", register, 4)
    _check_index("half", half, 2)
    return _fragment_coordinates(thread, 2 * register + half)


def accumulator_register_of_a_operand(step: int, register: int, half: int) -> int:
    """The accumulator register that holds what A operand (register, half) of the step-th 16 columns needs.

    It is the thread's own register, so P = softmax(S) becomes the A operand of P @ V by converting
    accumulator registers 2 i and 2 i + 1 into 32-bit register i: no shuffle, no permutation. Raises
    ValueError outside the ranges of a_operand_coordinates and the 16 steps of N = 256.
    """
    _check_index("step", step, WGMMA_MAX_N // WGMMA_K)
    _check_index("register", register, 4)
    _check_index("half", half, 2)
    return 8 * step + 2 * register + half


def fp8_a_operand_coordinates(thread: int, register: int, byte: int) -> tuple[int, int]:
    """(row, k) of the 64 x 32 A operand of 8-bit elements in `byte` of `register` (0 .. 3) of `thread` (0 .. 127).

    Raises ValueError outside these ranges. Source: PTX ISA, wgmma.mma_async m64nNk32, "Matrix A" in registers.
    """
    _check_index("thread", thread, WARPGROUP_THREADS)
    _check_index("register", register, 4)
    _check_index("byte", byte, 4)
    warp, lane = divmod(thread, 32)
    return 16 * warp + lane // 4 + 8 * (register % 2), 16 * (register // 2) + 4 * (lane % 4) + byte


def kv_order(place: int) -> int:
    """Which key the fp8 forward has at a place of the order that P and V^T have their keys in.

    Of every 16 a thread of the accumulator holds columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9, and as operand places 4 q to 4 q + 3: with the
    keys in this order they are the same, and P needs no exchange between lanes.
    """
    group, within = divmod(place, 16)
    quad_lane, i = divmod(within, 4)
    return 16 * group + 2 * quad_lane + i % 2 + 8 * (i // 2)


def column_order(row: int) -> int:
    """Which column of V a row of V^T holds in the fp8 forward: of every 16 the even ones, then the odd ones, as bytes fall apart.

    A thread of the accumulator then has columns 4 q to 4 q + 3 of every 16.
    """
    group, within = divmod(row, 16)
    return 16 * group + 2 * (within % 8) + within // 8


def mma_accumulator_coordinates(lane: int, register: int) -> tuple[int, int]:
    """(row, col) of the 16 x 8 accumulator element in `register` (0 .. 3) of `lane` (0 .. 31) of mma.sync m16n8k16.

    Raises ValueError outside these ranges. Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"; CuTe's
    SM80_16x8_Row.
    """
    _check_index("lane", lane, WARP_THREADS)
    _check_index("register", register, 4)
    return _fragment_coordinates(lane, register)


def mma_a_coordinates(lane: int, register: int, half: int) -> tuple[int, int]:
    """(row, k) of the 16 x 16 A element in `half` of `register` (0 .. 3) of `lane`; ranges and source as above."""
    _check_index("lane", lane, WARP_THREADS)
    return a_operand_coordinates(lane, register, half)


def mma_b_coordinates(lane: int, register: int, half: int) -> tuple[int, int]:
    """(k, col) of the 16 x 8 B element in `half` of `register` (0 or 1) of `lane`; ranges and source as above."""
    _check_index("lane", lane, WARP_THREADS)
    _check_index("register", register, 2)
    _check_index("half", half, 2)
    return 8 * register + 2 * (lane % 4) + half, lane // 4


def ldmatrix_coordinates(operand: str, lane: int) -> tuple[int, int]:
    """(row, column) of the 16 x 16 tile in shared memory where the 8 elements start whose address `lane` gives to a four-matrix ldmatrix.

    operand: "a": the tile is (row of A, k) and the words are mma's A registers. "b": the tile is (column of B, k); words 0 and 1 are B of
    the first 8 columns, 2 and 3 of the next 8. "b_mn_major": the same from a tile (k, column of B), by the transposed form. "a_mn_major":
    A's registers from a tile (k, row of A), by the transposed form.
    Raises ValueError for anything else. Source: PTX ISA, ldmatrix: lane l names row l % 8 of matrix l / 8.
    """
    _check_index("lane", lane, WARP_THREADS)
    if operand not in ("a", "a_mn_major", "b", "b_mn_major"):
        raise ValueError(f"operand must be a, a_mn_major, b or b_mn_major, not {operand}")
    matrix, row = divmod(lane, 8)
    first, second = (matrix // 2, matrix % 2) if operand in ("b", "a_mn_major") else (matrix % 2, matrix // 2)
    return 8 * first + row, 8 * second


@dataclass(frozen=True)
class PaddedTile:
    """A (rows, cols) tile of 16-bit elements whose rows lie 16 bytes further apart than they are long.

    A row is an even number of 16-byte units long, so the pitch is an odd number, and any eight neighbouring rows have the same unit in
    eight different places of the 128 bytes that the banks span: ldmatrix reads an 8 x 8 matrix, and the lanes of a warp write the
    fragments of an accumulator, without bank conflicts and without a swizzle, at addresses that are a register plus a constant.
    Raises ValueError unless cols is a multiple of 16.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows <= 0 or self.cols <= 0 or self.cols % 16:
            raise ValueError(f"rows must be positive and cols a positive multiple of 16, not {self.rows} and {self.cols}")

    @property
    def pitch_bytes(self) -> int:
        """From one row to the next."""
        return 2 * self.cols + _SWIZZLE_UNIT_BYTES

    @property
    def size_bytes(self) -> int:
        return self.rows * self.pitch_bytes

    def byte_offset(self, row: int, col: int) -> int:
        """Of element (row, col) from the start of the tile. Raises ValueError outside it."""
        _check_index("row", row, self.rows)
        _check_index("col", col, self.cols)
        return row * self.pitch_bytes + 2 * col
