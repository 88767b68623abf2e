// Renders conversations with Go's own text/template, set up as Ollama does it: missing keys are empty,
// system messages are gathered in .System, and neighbours of one role become one message.
//
// It reads a JSON list of {template, messages} on standard input and writes a list of texts.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string
	Content string
}

type task struct {
	Template string
	Messages []message
}

func render(t task) (string, error) {
	parsed, err := template.New("").Option("missingkey=zero").Parse(t.Template)
	if err != nil {
		return "", err
	}
	var systems []string
	var messages []*message
	for i := range t.Messages {
		m := &t.Messages[i]
		if m.Role == "system" {
			systems = append(systems, m.Content)
		}
		if n := len(messages); n > 0 && messages[n-1].Role == m.Role {
			messages[n-1].Content += "\n\n" + m.Content
		} else {
			messages = append(messages, m)
		}
	}
	var out strings.Builder
	err = parsed.Execute(&out, map[string]any{
		"System":   strings.Join(systems, "\n\n"),
		"Messages": messages,
		"Response": "",
	})
	return out.String(), err
}

func main() {
	var tasks []task
	if err := json.NewDecoder(os.Stdin).Decode(&tasks); err != nil {
		panic(err)
	}
	texts := make([]string, len(tasks))
	for i, t := range tasks {
		text, err := render(t)
		if err != nil {
			panic(err)
		}
		texts[i] = text
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
