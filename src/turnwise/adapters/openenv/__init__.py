"""OpenEnv (github.com/huggingface/OpenEnv): their environment servers as environments of turnwise, and ours as servers of theirs.

`env` is the environment, `text` what is text about it, `wire` the protocol, `local` servers that a run starts itself;
`server` serves an environment of ours and is the one part that needs their package.
"""
