"""What tests and benchmarks share: cases, the oracle, small networks, and headers of the C++ tests (cpp/)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
