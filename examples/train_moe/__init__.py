"""DeepSeek-V3 in small: MLA, node-limited MoE without dropped tokens, multi-token prediction, on commlib."""
