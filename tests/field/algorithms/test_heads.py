"""A head for each domain against plain numpy and ERM; predictions of MTL (its training: test_penalties.py)."""

import numpy as np
import pytest
import torch

from config import InputError


def test_mtl_predicts_with_the_mean_embedding_of_the_sources(methods):
    (method, params), x = methods.network("MTL"), methods.one_batch().features
    embeddings = torch.tensor([[1.0, 2, 3, 4], [3, -2, 0, 8]], dtype=torch.float64)
    found = method.logits(params, {"embeddings": embeddings}, x)
    both = torch.cat([methods.plain_hidden(params, x), torch.tensor([[2.0, 0, 1.5, 6]]).double().expand(len(x), 4)], 1)
    assert torch.allclose(found, both @ params["wide_head.weight"].T + params["wide_head.bias"], rtol=0, atol=1e-12)


def test_one_head_is_erm(methods):
    of = methods.setup(domains=1)
    heads = methods.run("MultiHead", 0, of=of).params
    own = {f"layers.3.{kind}": heads[f"heads.{kind}"].squeeze(1) for kind in ("weight", "bias")}
    erm = methods.engine(methods.make("ERM", of), first=methods.start(of=of) | own)
    for features, labels, domains in methods.batches(10, of, balanced=False):
        erm.step(features, labels, {}, domains)
    ours = methods.run("MultiHead", 10, of=of)
    x = methods.one_batch().features
    assert torch.allclose(ours.logits(x), erm.logits(x), rtol=0, atol=1e-9)
    assert torch.allclose(ours.params["heads.weight"].squeeze(1), erm.params["layers.3.weight"], rtol=0, atol=1e-9)


def test_each_image_trains_the_head_of_its_domain(methods):
    of = methods.setup(domains=3)
    (method, params), batch = methods.network("MultiHead", of), methods.one_batch(of, balanced=False)
    batch = batch._replace(domains=torch.tensor([2, 0, 2, 0, 0, 2]))  # domain 1 has none
    assert not torch.allclose(params["heads.weight"][0], params["heads.weight"][2])
    gradient, loss, _ = method.gradients(params, batch, {}, {})
    numbers = {name: value.numpy() for name, value in params.items()}
    z, wanted, slopes = methods.plain_hidden(params, batch.features).numpy(), 0.0, np.zeros((3, 3, 4))
    for row, y, d in zip(z, batch.labels.tolist(), batch.domains.tolist(), strict=True):
        logits = numbers["heads.weight"][d] @ row + numbers["heads.bias"][d]
        p = np.exp(logits) / np.exp(logits).sum()
        wanted -= np.log(p[y]) / 6
        slopes[d] += np.outer(p - np.eye(3)[y], row) / 6
    assert np.isclose(loss.item(), wanted)
    assert np.allclose(gradient["heads.weight"].numpy(), slopes, atol=1e-12)
    assert not gradient["layers.3.weight"].any()


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_heads_are_averaged(methods, average):
    (method, params), x = methods.network("MultiHead", average=average), methods.one_batch().features
    params["heads.weight"] *= 5
    z = methods.plain_hidden(params, x)
    each = [z @ params["heads.weight"][d].T + params["heads.bias"][d] for d in range(2)]
    wanted = (
        sum(each) / 2 if average == "logits" else (sum(v.exp() / v.exp().sum(1, keepdim=True) for v in each) / 2).log()
    )
    assert torch.allclose(method.logits(params, {}, x), wanted, rtol=0, atol=1e-12)


def test_an_unknown_average_is_refused(methods):
    with pytest.raises(InputError, match="`average` of MultiHead"):
        methods.run("MultiHead", 0, average="votes")
