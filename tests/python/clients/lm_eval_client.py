"""lm-eval, by its models for servers that are like OpenAI's: `SUITE URL MODEL TOKENIZER`, the last a folder."""
import json
import math
import sys

import kit
import requests
from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

PAIRS = [("The capital of France is", " Paris"), ("The capital of France is", " a small village"),
         ("One, two, three,", " four, five"), ("Water is", " wet")]
TEXT = "It was the best of times, it was the worst of times. " * 12


def _model(node, **more):
    return LocalCompletionsAPI(**(dict(model=node.model, base_url=node.base_url + "/completions", tokenizer=sys.argv[3],
                                       tokenizer_backend="huggingface", max_retries=1) | more))


def _instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=idx) for idx, one in enumerate(arguments)]


def _loglikelihoods(model):
    return model.loglikelihood(_instances("loglikelihood", PAIRS), disable_tqdm=True)


def _scores(node, ids):
    """Log-probabilities of the tokens of a prompt, asked for without the client."""
    body = dict(model=node.model, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    return requests.post(node.base_url + "/completions", json=body, timeout=60).json()["choices"][0]["logprobs"]["token_logprobs"]


def log_likelihoods_are_those_of_the_tokens(node):
    model = _model(node)
    for (context, continuation), (found, is_greedy) in zip(PAIRS, _loglikelihoods(model), strict=True):
        context, continuation = model._encode_pair(context, continuation)
        expected = sum(_scores(node, context + continuation)[len(context):])
        assert math.isclose(found, expected, abs_tol=1e-6) and found < 0, (found, expected)
        assert isinstance(is_greedy, bool)


def log_likelihoods_are_the_same_in_batches_and_at_once(node):
    alone = _loglikelihoods(_model(node))
    for more in (dict(batch_size=4), dict(num_concurrent=4), dict(batch_size=2, num_concurrent=2)):
        assert _loglikelihoods(_model(node, **more)) == alone, more


def a_text_is_scored_whole_in_windows(node):
    ids = _model(node).tok_encode(TEXT)
    for max_length in (64, 2048):
        model = _model(node, max_length=max_length)
        [found] = model.loglikelihood_rolling(_instances("loglikelihood_rolling", [(TEXT,)]), disable_tqdm=True)
        assert found < -len(ids) / 100, found
        if len(ids) < max_length:
            expected = sum(_scores(node, [model.prefix_token_id] + ids)[1:])
            assert math.isclose(found, expected, abs_tol=1e-4), (found, expected)


def what_follows_is_generated_by_both_models(node):
    kwargs = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    questions = [("The capital of France is", kwargs), ("One, two,", kwargs)]
    texts = _model(node).generate_until(_instances("generate_until", questions), disable_tqdm=True)
    assert len(texts) == 2 and all(texts), texts
    assert _model(node, batch_size=2).generate_until(_instances("generate_until", questions), disable_tqdm=True) == texts
    chat = LocalChatCompletion(model=node.model, base_url=node.base_url + "/chat/completions", max_retries=1)
    asked = [(JsonChatStr(json.dumps([{"role": "user", "content": text}])), kwargs) for text, _ in questions]
    answers = chat.generate_until(_instances("generate_until", asked), disable_tqdm=True)
    assert len(answers) == 2 and all(answers), answers


if __name__ == "__main__":
    kit.run(sys.modules["__main__"])
