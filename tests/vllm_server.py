"""Speaks vLLM's protocol over transformers and PEFT, as far as `engine: vllm` uses it: a real one needs gigabytes.

test_vllm.py runs the same tests against a real vLLM where ALIGN_VLLM names one. `faults` are what a server may do wrong.
"""

import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class Engine:
    """A base and the adapters over it."""

    def __init__(self, base):
        self.base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.name, self.adapters, self.lock = Path(base).name, {}, threading.Lock()
        self.loads, self.answered, self.faults = [], [], set()
        self.room = 256

    def load(self, name, path):
        if "rank" in self.faults:
            return 500, {"error": {"message": "LoRA rank 4 is greater than max_lora_rank 1.", "code": 500}}
        if name in self.adapters:
            return 400, f"The lora adapter '{name}' has already been loaded."
        if not (Path(path) / "adapter_config.json").is_file():
            return 404, f"No adapter found for {path}"
        # each over a copy of its own: PEFT writes into the model that it is given
        whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.base.name_or_path), path).eval()
        self.adapters[name] = list(self.adapters.values())[-1] if "stale" in self.faults and self.adapters else whole
        self.loads.append(name)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name):
        if self.adapters.pop(name, None) is None:
            return 404, f"The lora adapter '{name}' cannot be found."
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    @torch.no_grad()
    def complete(self, body):
        model = self.base if body["model"] == self.name else self.adapters.get(body["model"])
        if model is None:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        prompt, tokens, likely = body["prompt"], [], []
        generator = torch.Generator().manual_seed(body["seed"])
        temperature = 1.0 if "raw" in self.faults else body["temperature"]
        while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body["stop_token_ids"]):
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1]
            tokens.append(int(torch.multinomial((logits / body["temperature"]).softmax(-1), 1, generator=generator)))
            likely.append(float((logits / temperature).log_softmax(-1)[tokens[-1]]))
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": likely}, "finish_reason": "stop"}
        if "prompt_logprobs" in body:
            said = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
            listed = [{str(token): {"logprob": float(said[i, token]), "rank": 1}} for i, token in enumerate(prompt[1:])]
            choice["prompt_logprobs"] = [None, *listed]
        self.answered.append(body)
        return 200, {"choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        engine = self.server.engine
        listed = [{"id": engine.name, "parent": None, "max_model_len": engine.room}]
        listed += [{"id": name, "parent": engine.name} for name in engine.adapters]
        is_well = self.path != "/health" or "500" not in engine.faults
        self._answer(200 if is_well else 500, {"data": listed})

    def do_POST(self):
        body, engine = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server.engine
        with engine.lock:
            broken = engine.faults & {"500", "403"}
            if broken:
                status, said = int(broken.pop()), {"error": "out of order"}
            elif self.path == "/v1/load_lora_adapter" and "no adapters" not in engine.faults:
                status, said = engine.load(body["lora_name"], body["lora_path"])
            elif self.path == "/v1/unload_lora_adapter":
                status, said = engine.unload(body["lora_name"])
            elif self.path == "/v1/completions":
                status, said = engine.complete(body)
            else:
                status, said = 404, {"detail": "Not Found"}
        self._answer(status, said)

    def _answer(self, status, said):
        raw = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # connections at once


@contextmanager
def serving(base, port=0):
    """The engine, whose `url` is where it listens, on this machine."""
    server = Server(("127.0.0.1", port), Handler)
    server.handle_error = lambda *request: None  # who has given up does not read the answer
    server.engine = Engine(base)
    server.engine.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.engine
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":  # python -m tests.vllm_server BASE PORT
    torch.set_num_threads(1)
    with serving(sys.argv[1], int(sys.argv[2])) as one:
        print(one.url, flush=True)
        threading.Event().wait()
