"""Faults that somebody might build into reparamc, each with the smallest models on which it shows.

They are in the algebra, the rules, the regions, and the readers and emitters of both adapters. `planting` plants
them and asks who notices, `test_faults.py` demands that somebody does, `benchmarks/faults.py` prints the answers.
"""

from faults_in_algebra import ALGEBRA
from faults_in_fx import FX_READERS, FX_WRITERS
from faults_in_norms import NORMED
from faults_in_onnx import ONNX_READERS, ONNX_VALUES, ONNX_WRITERS
from faults_in_pieces import PIECES
from faults_in_placing import PLACED
from faults_in_shrink import SHRINK

ALL = [
    *ALGEBRA,
    *PIECES,
    *PLACED,
    *NORMED,
    *SHRINK,
    *ONNX_READERS,
    *ONNX_VALUES,
    *ONNX_WRITERS,
    *FX_READERS,
    *FX_WRITERS,
]
"""Every fault."""
