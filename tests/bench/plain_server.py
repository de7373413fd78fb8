"""The plain server that serving is measured against: FastAPI, uvicorn and torch, one image at a time."""

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request
from PIL import Image

from defuse_core.config import parse_run_file
from defuse_core.models import build_classifier

app = FastAPI()
torch.set_num_threads(1)
model = build_classifier(
    parse_run_file({"data": {"name": "mnist", "channels": 1, "root": "."}}, "plain"), 10
).eval()


@app.post("/v1/predict")
async def predict(request: Request) -> dict[str, object]:
    pixels = np.asarray(Image.open(io.BytesIO(await request.body())).convert("L"), np.float32) / 255
    image = torch.from_numpy(np.pad(pixels, 2))[None, None]
    with torch.inference_mode():
        shares = model(image).softmax(1)[0]
    return {"class": int(shares.argmax()), "probabilities": shares.tolist()}


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
