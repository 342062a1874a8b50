"""What loading takes in anonymous memory, watched from inside a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvchat.model.families import parse_config, tensor_shapes
from kvchat.model.source import resolve

MEMORY_CHILD = """
import math, re, sys, threading
import torch
from kvchat.model.families import parse_config, tensor_shapes
from kvchat.model.source import resolve
from kvchat.model.weights import load_decoder

def anonymous():
    status = open("/proc/self/status").read()
    return int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024

torch.set_num_threads(1)
source = resolve(sys.argv[1])
config = parse_config(source)
before, peak, is_loaded = anonymous(), 0, threading.Event()
def watch():  # torch lets go of the GIL inside its operations, so their scratch is seen as well
    global peak
    while not is_loaded.wait(0.001):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
decoder = load_decoder(source, config, sys.argv[2])
is_loaded.set()
watcher.join()
print(max(peak, anonymous()) - before, sum(map(math.prod, tensor_shapes(config).values())))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_loading_takes_the_model_in_its_final_dtype_and_little_more(tmp_path, dtype, num_bytes):
    config = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 1024}
    config |= {"num_hidden_layers": 4, "num_attention_heads": 16, "intermediate_size": 2816}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    shapes = tensor_shapes(parse_config(resolve(str(tmp_path))))
    save_file(
        {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        tmp_path / "model.safetensors",
    )

    done = subprocess.run(
        [sys.executable, "-c", MEMORY_CHILD, str(tmp_path), dtype],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    grown, num_params = map(int, done.stdout.split())
    assert num_params > 110_000_000
    assert grown < 1.1 * num_params * num_bytes
    if dtype == "bfloat16":  # what needs no conversion stays mapped: embeddings, o, down
        assert grown < 0.7 * num_params * num_bytes
