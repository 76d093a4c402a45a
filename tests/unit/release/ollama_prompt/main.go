// Renders templates as Ollama does: Go's own text/template, handed what Ollama hands a template.
//
// Written after Ollama's documentation and the behaviour of its `template` and `api` packages: a
// missing key is empty, `json` is the one function, neighbouring messages of one role are joined
// (but for tool results), all system messages together are `.System`, and tools and arguments are
// structures of its own, spelled by Go's JSON. Reads a JSON list of cases from stdin, writes the
// list of prompts.
package main

import (
	"bytes"
	"encoding/json"
	"log"
	"os"
	"strings"
	"text/template"
)

type arguments struct{ spelled json.RawMessage }

func (a *arguments) UnmarshalJSON(text []byte) error {
	// OpenAI's clients send them as text that holds JSON.
	var inner string
	if json.Unmarshal(text, &inner) == nil {
		text = []byte(inner)
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, text); err != nil {
		return err
	}
	a.spelled = compact.Bytes()
	return nil
}

func (a arguments) MarshalJSON() ([]byte, error) { return a.spelled, nil }
func (a arguments) String() string               { return string(a.spelled) }

type toolCall struct {
	ID       string `json:"id,omitempty"`
	Function struct {
		Index     int       `json:"index"`
		Name      string    `json:"name"`
		Arguments arguments `json:"arguments"`
	} `json:"function"`
}

type message struct {
	Role       string     `json:"role"`
	Content    string     `json:"content"`
	Thinking   string     `json:"thinking,omitempty"`
	ToolCalls  []toolCall `json:"tool_calls,omitempty"`
	ToolName   string     `json:"tool_name,omitempty"`
	ToolCallID string     `json:"tool_call_id,omitempty"`
}

type parameters struct {
	Type       string          `json:"type"`
	Defs       any             `json:"$defs,omitempty"`
	Items      any             `json:"items,omitempty"`
	Required   []string        `json:"required,omitempty"`
	Properties json.RawMessage `json:"properties"`
}

type tool struct {
	Type     string `json:"type"`
	Function struct {
		Name        string     `json:"name"`
		Description string     `json:"description,omitempty"`
		Parameters  parameters `json:"parameters"`
	} `json:"function"`
}

func (t tool) String() string { return spell(t) }

type tools []tool

func (t tools) String() string { return spell(t) }

func spell(value any) string {
	text, err := json.Marshal(value)
	if err != nil {
		log.Fatal(err)
	}
	return string(text)
}

func joined(messages []message) (string, []*message) {
	var system []string
	var kept []*message
	for at := range messages {
		one := messages[at]
		if one.Role == "system" {
			system = append(system, one.Content)
		}
		last := len(kept) - 1
		if last >= 0 && kept[last].Role == one.Role && one.Role != "tool" {
			kept[last].Content += "\n\n" + one.Content
			continue
		}
		kept = append(kept, &one)
	}
	return strings.Join(system, "\n\n"), kept
}

func main() {
	var cases []struct {
		Template string    `json:"template"`
		Messages []message `json:"messages"`
		Tools    tools     `json:"tools"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		log.Fatal(err)
	}
	prompts := make([]string, len(cases))
	for at, one := range cases {
		parsed, err := template.New("").
			Option("missingkey=zero").
			Funcs(template.FuncMap{"json": spell}).
			Parse(one.Template)
		if err != nil {
			log.Fatal(err)
		}
		system, messages := joined(one.Messages)
		var prompt strings.Builder
		err = parsed.Execute(&prompt, map[string]any{
			"System":   system,
			"Messages": messages,
			"Tools":    one.Tools,
			"Response": "",
		})
		if err != nil {
			log.Fatal(err)
		}
		prompts[at] = prompt.String()
	}
	if err := json.NewEncoder(os.Stdout).Encode(prompts); err != nil {
		log.Fatal(err)
	}
}
