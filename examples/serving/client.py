"""Ask a server for the digits in some images: the Open Inference Protocol with binary tensors, by hand, in numpy and the standard library.

python client.py http://127.0.0.1:8123 digits_cnn
"""

from __future__ import annotations

import http.client
import json
import sys
from urllib.parse import urlsplit

import numpy as np
from sklearn.datasets import load_digits


def infer(connection: http.client.HTTPConnection, model: str, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Send one FP32 tensor and return the outputs by name; the connection stays open for the next request."""
    raw = np.ascontiguousarray(array, np.float32).tobytes()
    tensor = {"name": name, "datatype": "FP32", "shape": array.shape, "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    connection.request(
        "POST", f"/v2/models/{model}/infer", head + raw, {"Inference-Header-Content-Length": str(len(head))}
    )
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {json.loads(body)['error']}")
    position = int(response.headers["Inference-Header-Content-Length"])
    outputs = {}
    for output in json.loads(body[:position])["outputs"]:
        end = position + output["parameters"]["binary_data_size"]
        outputs[output["name"]] = np.frombuffer(body[position:end], np.float32).reshape(output["shape"])
        position = end
    return outputs


def main() -> None:
    url, model = urlsplit(sys.argv[1]), sys.argv[2]
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=10)
    right = 0
    for start in range(0, 320, 32):
        logits = infer(connection, model, "image", images[start : start + 32])["logits"]
        right += int((logits.argmax(axis=1) == digits.target[start : start + 32]).sum())
    connection.close()
    print(f"{right} of 320 digits are right")
    if right < 250:
        sys.exit("fewer than a trained model gets right")


if __name__ == "__main__":
    main()
