"""A service that answers with a compressed model: it needs torch and spectrim alone, none of the training parts.

    python examples/service.py            # one request to itself, then it ends
    python examples/service.py 8000       # serves on that port until Ctrl-C

POST a JSON list of 64 numbers, the pixels of a digit; the answer is the class. With an ONNX file in place of the
checkpoint (``st.export_onnx``) a service needs onnxruntime alone: ``InferenceSession("small.onnx").run(None, ...)``.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from urllib.request import urlopen

import torch
from torch import nn

import spectrim as st

FILE = Path("digits.safetensors")


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def make_file() -> None:
    """What happens once, elsewhere. The weights are random here; yours are trained."""
    torch.manual_seed(0)
    model, batches = make_model(), [torch.rand(64, 64) for _ in range(4)]
    result = st.compress(model, batches, st.Budget(parameters=0.6), methods=st.ActivationSVD())
    st.save(result.model, result.plan, FILE)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        pixels = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with torch.inference_mode():
            answer = model(torch.tensor([pixels])).argmax(1).item()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"class": answer}).encode())


if not FILE.exists():
    make_file()
model = st.load(make_model(), FILE).eval()  # the dense constructor, and the file
server = HTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Handler)
if len(sys.argv) > 1:
    server.serve_forever()
Thread(target=server.serve_forever, daemon=True).start()
with urlopen(f"http://127.0.0.1:{server.server_port}", data=json.dumps([0.5] * 64).encode()) as answer:
    print(answer.read().decode())
server.shutdown()
server.server_close()
print("training parts loaded:", any(name.startswith("spectrim.train") for name in sys.modules))
