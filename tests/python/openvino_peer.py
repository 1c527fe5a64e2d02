#!/usr/bin/env python3
"""Times OpenVINO GenAI on a GGUF file; prints one JSON object. Runs with the Python that has openvino-genai.

    openvino_peer.py MODEL.gguf --threads 2 --sequences 16 --prompt 64 --output 32
"""
import argparse
import json
import random
import resource
import time

import openvino_genai

WORDS = "time water light house river stone green small night world paper music north table round seven".split()


def prompts(n, n_words, seed):
    draw = random.Random(seed)
    return [f"{i} " + " ".join(draw.choice(WORDS) for _ in range(n_words)) for i in range(n)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--output-alone", type=int, default=64)
    arguments = parser.parse_args()
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 512
    scheduler.cache_size = 1
    scheduler.max_num_seqs = max(32, arguments.sequences)
    scheduler.enable_prefix_caching = False
    start = time.perf_counter()
    pipeline = openvino_genai.LLMPipeline(arguments.model, "CPU", scheduler_config=scheduler,
                                          INFERENCE_NUM_THREADS=arguments.threads, CACHE_DIR="")
    load_s = time.perf_counter() - start

    def generate(texts, n):
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample, config.apply_chat_template = n, True, False, False
        begin = time.perf_counter()
        metrics = pipeline.generate(texts, config).perf_metrics
        return metrics, time.perf_counter() - begin

    generate(prompts(1, 8, 0), 4)
    alone, _ = generate(prompts(1, arguments.prompt, 1), arguments.output_alone)
    many, many_s = generate(prompts(arguments.sequences, arguments.prompt, 2), arguments.output)
    print(json.dumps({
        "load_s": load_s,
        "decode": 1e3 / alone.get_tpot().mean,
        "ttft_ms": alone.get_ttft().mean,
        "output": many.get_num_generated_tokens() / many_s,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))


if __name__ == "__main__":
    main()
