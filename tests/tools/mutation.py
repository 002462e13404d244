"""``python -m tests.tools.mutation``: do the tests notice a fault? Plants faults in the kernels.

Each fault is an exact replacement of text in a temporary copy of the tree, alone there. The files that depend on it are
rebuilt, for the portable instruction set alone, which has the same code. Then the op's plain C++ test must fail. For a
fault before the kernels, or in CUDA's, the named tests of pytest must fail. Exit code 1 when a fault survives, or can
no longer be planted.

    python -m tests.tools.mutation [NAME ...]     # only the faults whose name holds one of the words
    python -m tests.tools.mutation --third        # the third of them that the commit picks
"""

from __future__ import annotations

import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.support import ROOT, specs
from tests.support.parts import picked, third_of
from tests.support.spec import EMULATOR, GATES, Fault

BIAS = "csrc/common/cpu_bias.h"
VECTOR = "csrc/common/cpu_vector.h"
CUDA_SUMS = "csrc/common/channel_sums.cuh"
WALKS = "csrc/common/patch_walk.cuh"
CONTIGUOUS = f"{EMULATOR} -k 'relu_lrn_max_pool2d and {{}} and contiguous'"
SLOWER = f"{GATES} -k 'relu_lrn_max_pool2d and backward'"
SURVEY, CALLS = "alexnet_ext/accelerate/survey.py", "alexnet_ext/accelerate/calls.py"
WATCH, TRACING = "alexnet_ext/accelerate/watch.py", "alexnet_ext/accelerate/tracing.py"
CHILD, PARENT = "alexnet_ext/selfcheck/child.py", "alexnet_ext/selfcheck/prover.py"
KNOWN, CANDIDATES = "alexnet_ext/ops/_known.py", "alexnet_ext/ops/conv2d_bias_relu/candidates.py"
PROVE, PROVER = "tests/selfcheck/test_prove.py", "tests/selfcheck/test_prover.py"
OFFERED, FIRST = "tests/selfcheck/test_candidates.py", "tests/selfcheck/test_first_call.py"
DRAWN = "tests/accelerate/test_accelerate_generated.py -k 'before and {}'"
BY_MODULES, BY_FX = DRAWN.format("modules"), DRAWN.format("fx")
WRITER, WRITTEN = "alexnet_ext/training/writer.py", "tests/training/test_writer.py"
STOPS, AUTO = "alexnet_ext/training/interrupt.py", "tests/training/test_kills.py -k 'auto and {}'"
SHARES, RANKS = "alexnet_ext/parallel/data.py", "tests/parallel/test_ranks.py -k number_of_ranks"
TOWERS = "tests/parallel/test_towers.py -k '2-towers'"
SECONDS = 240  # a fault may make a loop endless; four times as long where none is planted, on a busy machine
MOST_TREES = 4  # copies of the tree, in each of which one fault stands at a time

# Those in no op's files: what ops share, accelerate, what proves kernels. The others are in tests/ops/<op>/spec.py.
SHARED = (
    Fault("bias: one channel's added to all (channels-last)", BIAS, "+= widen(bias[i]);\n    return",
          "+= widen(bias[0]);\n    return", "relu_max_pool2d_lrn"),
    Fault("bias gradient: tail of a row not summed", BIAS, "for (; j < s.width; ++j) sum += values[j];", "",
          "relu_lrn_max_pool2d"),
    Fault("bf16: truncated, not rounded", VECTOR, "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16",
          "relu_max_pool2d_lrn"),
    Fault("fp16: ties rounded up, not to even", VECTOR, "0xfffu + ((magnitude >> 13) & 1u)", "0x1000u",
          "relu_max_pool2d_lrn"),
    Fault("fp16: subnormals read as 0", VECTOR, "uint32_t scaled = to_bits(from_bits(magnitude) * 0x1p112f);",
          "uint32_t scaled = magnitude < 0x800000u ? 0 : to_bits(from_bits(magnitude) * 0x1p112f);",
          "local_response_norm"),
    Fault("boundary: images of any strides taken for dense", "csrc/common/tensor.h",
          "if (x.size(i) <= 1 || x.stride(i) == strides[i]) continue;", "continue;",
          "tests/ops/relu_max_pool2d/test_relu_max_pool2d.py -k 'values_and_gradients and sliced and float32'"),
    Fault("ReLU: gradient 1 at 0", "csrc/common/relu_mask_cpu.cpp", "widen(result[i]) <= 0 ?",
          "widen(result[i]) < 0 ?", "relu_mask"),
    Fault("boundary: bias gradient of the first band alone", "csrc/common/lrn_pool_block.h", "u < units_", "u < 1",
          "tests/ops/relu_lrn_max_pool2d/test_relu_lrn_max_pool2d.py "
          "-k 'values_and_gradients and contiguous and float32'"),
    Fault("CUDA: no barrier before rows are added up", CUDA_SUMS,
          "shared[threadIdx.x] = sum;\n  __syncthreads();\n  if (run", "shared[threadIdx.x] = sum;\n  if (run",
          f"{EMULATOR} -k 'order and conv2d_bias_relu'"),
    Fault("CUDA: rows after the first round are left out", CUDA_SUMS, "row += kRound * kRuns", "row += rows",
          f"{EMULATOR} -k 'many and conv2d_bias_relu'"),
    Fault("CUDA: reciprocal rounded down", "csrc/common/images.cuh", "static_cast<uint64_t>(divisor) + 1",
          "static_cast<uint64_t>(divisor)", f"{EMULATOR} -k 'to_the_bit and float32 and not augment'"),
    Fault("CUDA: reciprocal of 32 bits rounded down", "csrc/common/images.cuh", "/ value + 1)", "/ value)",
          f"{EMULATOR} -k 'to_the_bit and float32 and not augment'"),
    Fault("accelerate: a ReLU in place behind whatever layer", SURVEY,
          "if before is None or type(before) not in RETURN_NEW:", "if before is None:", BY_MODULES),
    Fault("accelerate: a ReLU in place behind a layer with hooks", SURVEY,
          "if has_hooks(before) or is_replaced(before):", "if is_replaced(before):", BY_MODULES),
    Fault("accelerate: layers that are run one by one", SURVEY,
          'if reason := known.opened.get(places[0].parent, ""):', "if reason := '':", BY_MODULES),
    Fault("accelerate: the same where no trace shows it", SURVEY, "readers.taken_apart(model, {",
          "readers.taken_apart(nn.Module(), {", BY_FX),
    Fault("accelerate: a layer that another method runs alone", SURVEY,
          "return _used_elsewhere(known, places) or _over", "return _over", BY_FX),
    Fault("accelerate: a layer by its second name", TRACING,
          "place.parent._modules[place.key] = module = twin", "pass", BY_FX),
    Fault("accelerate: what a forward does besides, done once", WATCH, "sys.setprofile(self)", "pass", BY_FX),
    Fault("accelerate: what a forward changes, changed once", WATCH, "in FORBIDDEN.items():", "in ():", BY_FX),
    Fault("accelerate: LRN's learned constants taken for numbers", CALLS, "fixed = not any(", "fixed = True or any(",
          BY_FX),
    Fault("accelerate: ReLU moved behind what writes into its input", CALLS, "graph.inserting_before(relu)",
          "graph.inserting_before(node)", BY_FX),
    Fault("accelerate: a ReLU in place whose input is read", CALLS, "or len(given.users) != 1:", "or False:", BY_FX),
    Fault("proof: fences not looked at", CHILD, "if broken:", "if False:", f"{PROVE} -k writes"),
    Fault("proof: memory is zero until it is written", "alexnet_ext/selfcheck/guards.py", "FILL = 255", "FILL = 0",
          f"{PROVE} -k leaves_a_part"),
    Fault("proof: a single run", CHILD, "RUNS = 3", "RUNS = 1", f"{PROVE} -k second_call"),
    Fault("proof: dense gradients alone", CHILD, "for grad in case.grads:", 'for grad in ("dense",):',
          f"{PROVE} -k wrong_for"),
    Fault("proof: a device that is spoiled after right results", CHILD, 'if state == "proven" and not usable:',
          "if False:", f"{PROVER} -k spoil"),
    Fault("proof: the process outlives the one that started it", CHILD,
          "threading.Thread(target=_end_with_parent, daemon=True).start()", "pass", f"{PROVER} -k ends_with_the_one"),
    Fault("proof: a crash refuses nothing", PARENT, 'if killed else "refused"', 'if killed else "proven"',
          f"{PROVER} -k ends_the_process"),
    Fault("proof: a hang is tried for ever again", PARENT, 'Proof("refused", f"a case did not end',
          'Proof("unknown", f"a case did not end', f"{PROVER} -k 'hangs or spoil'"),
    Fault("proof: what did not start is refused", PARENT, 'dict.fromkeys(left, Proof("unknown", trouble))',
          'dict.fromkeys(left, Proof("refused", trouble))', f"{PROVER} -k does_not_start", 2),
    Fault("proof: compilers outlive an interrupt", PARENT, "os.killpg(self.process.pid, signal.SIGKILL)",
          "self.process.kill()", f"{PROVER} -k interrupted"),
    Fault("proof: candidates race in the process that proves", "alexnet_ext/ops/_race.py",
          "return allowed and is_plain()", "return is_plain()", f"{OFFERED} -k no_other_runs"),
    Fault("known: a refusal forgotten at the merge", KNOWN,
          'if proof.state == "refused" or proofs.get(unit, proof).state != "refused":', "if True:",
          f"{PROVE} -k outlasts"),
    Fault("known: a new driver keeps the proofs", KNOWN, '"driver": driver(), ', "", f"{PROVE} -k another_identity"),
    Fault("race: unproven candidates offered", CANDIDATES,
          "found = [algorithm for algorithm in found if _is_proven(algorithm, x)]", "pass", f"{OFFERED} -k offered"),
    Fault("race: unproven backends take part", "alexnet_ext/selfcheck/races.py",
          'if states[backend] == "proven"}', 'if states[backend] != ""}', f"{PROVE} -k refused_alone"),
    Fault("race: what differs from stock takes part", "alexnet_ext/selfcheck/races.py",
          "if same(results, expected):", "if True:", f"{PROVE} -k differs_at_the_models_shape"),
    Fault("race: any gain over stock counts", "alexnet_ext/ops/_race.py", "MARGIN = 0.95", "MARGIN = 1.0",
          f"{PROVE} -k more_than_noise"),
    Fault("race: under deterministic algorithms", "alexnet_ext/ops/_race.py",
          "is_plain() and not torch.are_deterministic_algorithms_enabled()", "is_plain()",
          "tests/selfcheck -k deterministic"),
    Fault("first call: proves inside a trace", "alexnet_ext/selfcheck/first_call.py", "if not _race.is_plain():",
          "if False:", f"{FIRST} -k traced_or_transformed"),
    Fault("first call: tries again in vain", "alexnet_ext/selfcheck/first_call.py", "if attempt in _attempted:",
          "if False:", f"{FIRST} -k not_tried_again"),
    Fault("slower: two lanes store to one bank", CUDA_SUMS,
          "V == 8 ? ((thread * 2 + i / 4) ^ (thread / 4 & 1)) * 4 + i % 4 : thread * V + i", "thread * V + i", SLOWER),
    Fault("slower: more blocks than fit", "csrc/common/channel_sums.h", "(steps < most ? steps : most) * step;",
          "(steps < most ? steps : most) * step + step;", SLOWER),
    Fault("CUDA walk: the patch below taken for the one on the right", WALKS, "below * across + right",
          "right * across + below", CONTIGUOUS.format("float32")),
    Fault("CUDA walk: the second column of an odd image", WALKS, "2 * column + 1 < p.width", "true",
          CONTIGUOUS.format("float32")),
    Fault("CUDA walk: a patch too many in a run", WALKS, "own(kBlockThreads - across - 1)",
          "own(kBlockThreads - across)", CONTIGUOUS.format("many")),
    Fault("CUDA walk: bias sums of one warp", WALKS, "warp < kWarps; ++warp", "warp < 1; ++warp",
          CONTIGUOUS.format("many")),
    Fault("CUDA walk: no barrier before other patches' windows are read", WALKS,
          "winners_[threadIdx.x] = won;\n    __syncthreads();", "winners_[threadIdx.x] = won;",
          CONTIGUOUS.format("order")),
    Fault("CUDA walk: no barrier before the next windows are put", WALKS, "__syncthreads();\n    store<kRun>(",
          "store<kRun>(", CONTIGUOUS.format("order")),
    Fault("checkpoint: written from what the next step changes", WRITER, "return held.copy_(value, non_blocking=True)",
          "return value.detach()", f"{WRITTEN} -k of_its_step"),
    Fault("checkpoint: the writer's error dropped", WRITER, "self.error = error", "pass",
          f"{WRITTEN} -k 'fails or failed'"),
    Fault("checkpoint: a stop that does not wait for it", "alexnet_ext/training/trainer.py",
          "if stopping or finished:\n                    self.ranks.first_does(self.writer.wait)",
          "if False:\n                    pass",
          f"{WRITTEN} -k waits_for_its_checkpoint"),
    Fault("checkpoint: two writers at once", WRITER, "        self.wait()\n        self.thread = threading",
          "        self.thread = threading",
          f"{WRITTEN} -k one_job"),
    Fault("checkpoint: its name before its content is on the disk", "alexnet_ext/training/files.py",
          "            sync(file)\n        sync(beside)", "            pass", f"{WRITTEN} -k on_the_disk"),
    Fault("signals: SIGUSR1 kills", STOPS, "signal.SIGHUP, signal.SIGUSR1, ", "signal.SIGHUP, ",
          "tests/training/test_kills.py -k 'during_the_imports'"),
    Fault("auto: a finished run is begun again", "alexnet_ext/training/run.py", 'if state == "finished":',
          "if False:", AUTO.format("newest")),
    Fault("auto: any recipe will do", "alexnet_ext/training/runs.py", "CHANGEABLE}) == recipe",
          "CHANGEABLE}) is not None", AUTO.format("newest")),
    Fault("ranks: gradients divided by their number", SHARES, "done.value()[0]", "done.value()[0] / 2", RANKS),
    Fault("ranks: each drops what the first one does", SHARES, "[first : first + len(x), self",
          "[: len(x), self", RANKS),
    Fault("ranks: a loss divided by this rank's images", "alexnet_ext/training/step.py",
          "return sum(place.images for place in self.places)", "return max(1, sum(len(p.targets) for p in group))",
          RANKS),
    Fault("ranks: the signal of torchrun hides why they end", "alexnet_ext/parallel/ranks.py", "        ignore()  #",
          "        #", "tests/parallel/test_ranks.py -k dies"),
    Fault("ranks: each looks for the last good checkpoint", "alexnet_ext/training/trainer.py",
          "not math.isfinite(loss) and self.ranks.first", "not math.isfinite(loss)",
          "tests/parallel/test_ranks.py -k is_no_number"),
    Fault("ranks: those that have lost one say what it was", "alexnet_ext/parallel/ranks.py",
          'return store.add(f"said/{text}", 1) == 1', "return True", "tests/parallel/test_ranks.py -k dies"),
    Fault("ranks: evaluated in the order of ranks", "alexnet_ext/training/evaluate.py",
          "for turn in zip(*ranks.gather(own), strict=True) for", "for turn in ranks.gather(own) for",
          "tests/parallel/test_ranks.py -k each_image_once"),
    Fault("towers: fc8's gradient lost", "alexnet_ext/parallel/collectives.py", "    parts[wire.rank] = x\n", "",
          TOWERS),
    Fault("towers: the border from the other side", "alexnet_ext/parallel/collectives.py",
          "border = x[:, -width:] if first else x[:, :width]", "border = x[:, :width] if first else x[:, -width:]",
          TOWERS),
    Fault("slower: contiguous images by the general path", WALKS, "return p.dtype != DType::f64 &&", "return false &&",
          f"{GATES} -k 'relu_max_pool2d_lrn and backward and 27x27 and bfloat16 and contiguous'"),
)  # fmt: skip
FAULTS = (*specs.of_all("faults", tuple(specs.SPECS)), *SHARED)


class Tree:
    """The copy of the tree that faults are planted in, and its build folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tree"
        self.build = folder / "build"
        kept_out = shutil.ignore_patterns(".*", "*.so", "__pycache__", "*.egg-info")

        def left_out(folder: str, names: list[str]) -> set[str]:
            made = {"build", "dist", "runs", "predictions"} if Path(folder) == ROOT else set()
            return kept_out(folder, names) | made

        shutil.copytree(ROOT, self.folder, ignore=left_out)
        # cmake and ninja of this Python before those of the distribution, which may be too old.
        self.path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._run(
            [
                *("cmake", "-G", "Ninja", "-S", str(self.folder), "-B", str(self.build)),
                *(f"-DPython_EXECUTABLE={sys.executable}", f"-DALEXNET_EXT_OUTPUT={self.folder / 'alexnet_ext'}"),
                *("-DALEXNET_EXT_TESTS=ON", "-DALEXNET_EXT_EMULATOR=ON"),
                *("-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1"),
                # Named as a target of its own, the machine is none that CMakeLists.txt knows instruction sets for.
                *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=portable"),
            ],
            "the tree does not configure",
        )

    def _run(self, command: list[str], failure: str) -> None:
        # No nvcc: the CUDA kernels run on the CPU here.
        environment = {**os.environ, "CUDACXX": "none", "PATH": self.path}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{failure}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")

    def make(self, test: str) -> list[str]:
        """Builds what ``test`` needs, and no more; the command that runs it."""
        ninja = ["ninja", "-C", str(self.build)]
        if test.startswith("tests/"):
            targets = ["cpu", "emulator"] if test.startswith(EMULATOR) else ["cpu"]
            self._run([*ninja, *targets], f"{test}: the library does not compile")
            options = ("-x", "-n0", "-p", "no:cacheprovider", "--emulator", str(self.folder / "alexnet_ext"))
            return [sys.executable, "-m", "pytest", *options, *shlex.split(test)]
        # One kernel's file of all those that ctest's program links: the others may depend on the fault's file too.
        (kernel,) = self.folder.glob(f"csrc/**/{test}_cpu.cpp")
        (program,) = self.folder.glob(f"tests/ops/**/test_{test}.cpp")
        objects = [
            f"CMakeFiles/test_{test}.dir/{program.relative_to(self.folder)}.o",
            f"CMakeFiles/cpu_kernels_portable.dir/{kernel.relative_to(self.folder)}.o",
            "CMakeFiles/cpu_kernels.dir/csrc/common/isa.cpp.o",
        ]
        linked = str(self.build / f"one_{test}")
        self._run([*ninja, *objects], f"{test} does not compile")
        self._run(["c++", "-pthread", "-o", linked, *(str(self.build / name) for name in objects)], "does not link")
        return [linked]

    def notices(self, test: str, seconds: float = SECONDS) -> str:
        """Builds what ``test`` needs and runs it; how it noticed a fault, "" when it passed."""
        command = self.make(test)
        try:
            done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"no end after {seconds} s"
        if done.returncode == 0:
            return ""
        if done.returncode < 0:
            return f"stopped by signal {-done.returncode}"
        lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
        if done.returncode != 1 or not lines:
            raise SystemExit(f"{' '.join(command)} did not run:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return lines[0].removeprefix("FAILED ")

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        path = self.folder / fault.file
        before = path.read_text()
        found = before.count(fault.old)
        if found != fault.times:
            raise SystemExit(
                f"{fault.name}: {fault.file} holds {fault.old!r} {found} times, expected {fault.times}: "
                "the code has changed, so the fault must follow (its op's spec, or tests/tools/mutation.py)"
            )
        path.write_text(before.replace(fault.old, fault.new))
        try:
            yield
        finally:
            path.write_text(before)


@contextmanager
def taken(trees: queue.SimpleQueue[Tree]) -> Iterator[Tree]:
    """One that nobody else has."""
    tree = trees.get()
    try:
        yield tree
    finally:
        trees.put(tree)


def main(words: list[str]) -> int:
    thirds = "--third" in words
    words = [word for word in words if word != "--third"]
    faults = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    if thirds:
        faults = [fault for fault in faults if third_of(fault.name) == picked()]
        print(f"third {picked() + 1} of 3: {len(faults)} of {len(FAULTS)} faults", flush=True)
    if not faults:
        raise SystemExit(f"no fault's name holds {' or '.join(words)}")
    started = time.monotonic()
    survivors, jobs = 0, min(len(faults), os.cpu_count() or 1, MOST_TREES)
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder, ThreadPoolExecutor(jobs) as pool:
        trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
        for number in range(jobs):
            trees.put(Tree(Path(folder) / str(number)))

        def passes(test: str) -> None:
            with taken(trees) as tree:
                if noticed := tree.notices(test, 4 * SECONDS):
                    raise SystemExit(f"{test} fails with no fault planted: {noticed}")

        def notices(fault: Fault) -> str:
            with taken(trees) as tree, tree.planted(fault):
                return tree.notices(fault.test)

        try:
            for _ in pool.map(passes, dict.fromkeys(fault.test for fault in faults)):
                pass
            print(f"no fault planted: all tests pass ({time.monotonic() - started:.0f} s)", flush=True)
            for number, (fault, noticed) in enumerate(zip(faults, pool.map(notices, faults), strict=True), 1):
                survivors += not noticed
                verdict = "killed  " if noticed else "SURVIVED"
                print(f"{number:2d}  {verdict}  {fault.name:56s}  {noticed[:120]}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    seconds = time.monotonic() - started
    print(f"{len(faults) - survivors} of {len(faults)} planted faults noticed in {seconds:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
