import numpy as np
import pytest
import torch

from sse_rl.model import PackedInputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(
    ("slots", "graphs"), [(40, 2), (15, 1)], ids=["room for all", "prefills beside steps"]
)
@pytest.mark.parametrize("kind", ["gla", "gdn"])
def test_a_captured_step_gives_the_logprobs_of_a_plain_forward(
    tiny_model, make_engine, make_request, kind: str, slots: int, graphs: int
):
    model = tiny_model(kind, use_short_conv=True).cuda()
    other = tiny_model(kind, seed=1, use_short_conv=True).state_dict()
    engine = make_engine(model, max_num_seqs=slots, num_pages=200)
    requests = [make_request(i, n, n=13, max_tokens=80) for i, n in enumerate((1, 40, 130))]
    for version in range(2):
        for request, completions in zip(requests, engine.generate(requests), strict=True):
            for completion in completions:
                prompt, sampled = request.prompt_token_ids, completion.token_ids.tolist()
                fed = torch.tensor([*prompt, *sampled[:-1]], device="cuda")
                seqs = PackedInputs(
                    cu_seqlens=torch.tensor([0, len(fed)], device="cuda"),
                    positions=torch.arange(len(fed), device="cuda"),
                    max_seqlen=len(fed),
                    replay=torch.from_numpy(completion.routing).cuda(),
                )
                hidden = model.packed(fed, seqs).hidden[len(prompt) - 1 :]
                logprobs = model.logits(hidden).log_softmax(-1)
                chosen = logprobs.gather(1, torch.tensor(sampled, device="cuda")[:, None])[:, 0]
                np.testing.assert_allclose(completion.logprobs, chosen.cpu(), atol=1e-4, rtol=0)
        engine.set_weights(other, version=version + 1)
    assert len(engine._runner.graphs) >= graphs
