module ollama_prompt

go 1.24
