// Package tap writes results in the Test Anything Protocol, version 13
// (https://testanything.org/tap-version-13-specification.html).
//
// The validation suite imports github.com/mndrix/tap-go, which Debian does not package.
// This stands in for it: what the suite calls, and no more.
package tap

import (
	"encoding/json"
	"fmt"
	"strings"
)

// T is one run of a test program.
type T struct {
	// points counts the results so far.
	points *int
	// todo marks what is reported as not expected to pass.
	todo bool
}

// New begins a run.
func New() *T {
	return &T{points: new(int)}
}

// Header writes the version line and, if the number of points is known (not 0), the plan.
func (t *T) Header(points int) {
	fmt.Println("TAP version 13")
	if points > 0 {
		fmt.Printf("1..%d\n", points)
	}
}

// AutoPlan writes the plan after the fact: as many points as there were.
func (t *T) AutoPlan() {
	fmt.Printf("1..%d\n", *t.points)
}

// Todo gives the same run; what is reported through it need not pass.
func (t *T) Todo() *T {
	return &T{points: t.points, todo: true}
}

// Ok reports one point.
func (t *T) Ok(passed bool, description string) {
	result := "ok"
	if !passed {
		result = "not ok"
	}
	t.point(result, "- "+oneLine(description))
}

// Pass reports a point that passed.
func (t *T) Pass(description string) {
	t.Ok(true, description)
}

// Fail reports a point that failed.
func (t *T) Fail(description string) {
	t.Ok(false, description)
}

// Skip reports points that were not tried.
func (t *T) Skip(count int, description string) {
	for i := 0; i < count; i++ {
		t.point("ok", "# SKIP "+oneLine(description))
	}
}

// Diagnostic writes a remark.
func (t *T) Diagnostic(text string) {
	fmt.Println("# " + strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n# "))
}

// Diagnosticf writes a formatted remark.
func (t *T) Diagnosticf(format string, values ...interface{}) {
	t.Diagnostic(fmt.Sprintf(format, values...))
}

// YAML writes a structured remark about the point before it. All JSON is YAML.
func (t *T) YAML(remark interface{}) error {
	text, err := json.MarshalIndent(remark, "  ", "  ")
	if err != nil {
		return err
	}
	fmt.Printf("  ---\n  %s\n  ...\n", text)
	return nil
}

func (t *T) point(result, rest string) {
	if t.todo {
		rest = "# TODO " + rest
	}
	*t.points++
	fmt.Printf("%s %d %s\n", result, *t.points, rest)
}

// A description must not end its line, nor look like a directive, which a "#" begins.
func oneLine(text string) string {
	return strings.NewReplacer("\n", " ", "#", "\\#").Replace(text)
}
