"""Sums of one digit as an environment of verifiers, by the API that is installed: 0.3 (`load_environment`) or 0.4 (a taskset).

Needs reasoning-gym. With this folder on PYTHONPATH `id = "verifiers:vf-sums"` finds it, as in `configs/adapters/verifiers.toml`.
"""

from importlib.metadata import version

CHAIN_SUM = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
ASK = "Reply with the number and nothing else."

if version("verifiers").startswith("0.3"):
    import verifiers as vf

    def load_environment(num_train: int = 500, num_validation: int = 64, seed: int = 0) -> vf.Environment:
        """The environment that comes with verifiers for reasoning-gym; the whole reply is the answer."""
        return vf.ReasoningGymEnv(
            gym=[{"name": "chain_sum", "weight": 1.0, "config": CHAIN_SUM}],
            num_train_examples=num_train,
            num_eval_examples=num_validation,
            system_prompt=ASK,
            parser=vf.Parser(),
            seed=seed,
        )

else:
    import reasoning_gym
    import verifiers.v1 as vf

    class SumsConfig(vf.TasksetConfig):
        count: int = 564
        seed: int = 0

    class SumData(vf.TaskData):
        entry: dict

    class SumTask(vf.Task[SumData, vf.State, vf.TaskConfig]):
        @vf.reward
        async def correct(self, trace: vf.Trace) -> float:
            replies = [node.message.content or "" for node in trace.nodes if node.sampled]
            return SCORER.score_answer(answer=replies[-1].strip() if replies else None, entry=self.data.entry)

    class Sums(vf.Taskset[SumTask, SumsConfig]):
        def load(self):
            for entry in reasoning_gym.create_dataset("chain_sum", size=self.config.count, seed=self.config.seed, **CHAIN_SUM):
                yield SumTask(SumData(prompt=entry["question"], system_prompt=ASK, entry=entry), self.config.task)

    SCORER = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)
    __all__ = ["Sums"]
