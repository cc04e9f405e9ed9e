"""The nftables rules of the host and of a pod, as files that nft(8) reads: data, no code."""
