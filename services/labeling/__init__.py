"""Review by people in Label Studio: pushing images, pulling answers, and a server to try it out."""
